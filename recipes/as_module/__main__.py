"""`python -m finequant`: the command, for environments whose scripts are not on the path."""

from finequant.recipes.run import main

if __name__ == "__main__":
    main()
