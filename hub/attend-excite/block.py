"""Attend-and-Excite for diffusers' modular pipelines: the block is in the package attend-excite."""

from attend_excite.modular import Nurse

__all__ = ["Nurse"]
