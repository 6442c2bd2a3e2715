"""accelerate launch train_sdvae.py --config configs/sd_f8c4.yaml [--dotted.key=value …]; same as `sdvae train`."""

import sys

from sdvae.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
