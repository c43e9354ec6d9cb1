"""Speed and memory against diffusers' deprecated class: `attend-excite bench` from a checkout.

python -m benchmarks.speed --size quarter
"""

import typer

from attend_excite.cli.bench import bench

if __name__ == "__main__":
    typer.run(bench)
