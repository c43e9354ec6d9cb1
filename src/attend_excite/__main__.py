"""`python -m attend_excite`: the program, also where its scripts are on no path."""

from attend_excite.cli import main

main()
