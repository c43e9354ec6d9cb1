"""Speed and memory against diffusers' deprecated class, side by side: what `attend-excite bench` measures."""
