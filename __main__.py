"""`python -m hydrahead` is the command `hydrahead`."""

from .cli import main

if __name__ == "__main__":
    main()
