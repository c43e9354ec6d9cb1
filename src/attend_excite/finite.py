"""Numbers that broke: an error that says where, and no black picture."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def check_finite(where: str, parts: Mapping[str, Tensor]) -> None:
    """Check what came out, the last of `parts`; if it broke, name the first of them that did.

    Args:
        where: "at step 3 of 50".
        parts: by name, each with an image as its first axis, in the order in which they come about.

    Raises:
        ValueError: the last part has a NaN or an infinity.
    """
    *_, last = parts.values()
    if last.isfinite().all():
        return
    for part, tensor in parts.items():
        finite = tensor.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            images = ", ".join(str(at) for at in (~finite).nonzero().flatten().tolist())
            raise ValueError(
                f"the {part} became NaN or infinite {where} (image {images} of the batch): a weight of the "
                "model is broken, a number of the recipe or of the guidance is far too large, or half "
                'precision is too narrow (dtype="bfloat16" or "float32")'
            )
