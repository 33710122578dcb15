"""`python -m vfl` is the program `vfl`."""

from vfl.cli import main

if __name__ == "__main__":
    main()
