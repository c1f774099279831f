"""`python -m fedforward.cli`."""

from fedforward.cli.main import main

if __name__ == "__main__":
    main()
