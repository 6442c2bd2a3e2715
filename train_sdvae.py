"""Train a VAE like `sdvae train`: accelerate launch train_sdvae.py --config configs/sd_f8c4.yaml [--key=value …]"""

import sys

from sdvae.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
