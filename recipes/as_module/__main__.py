"""`python -m finequant`: the command, where no script of that name is on the path."""

from finequant.recipes.run import main

if __name__ == "__main__":
    main()
