import sys

from sdvae.cli import main

sys.exit(main(sys.argv[1:]))
