"""`python -m medaug`: the command line."""

from medaug.cli import main

if __name__ == "__main__":
    main()
