"""`python -m potstill.pipeline` is `potstill`, for `torchrun -m`."""

from potstill.pipeline.cli import main

if __name__ == "__main__":
    main()
