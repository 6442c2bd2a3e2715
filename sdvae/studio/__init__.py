"""Looking at a VAE and sharing it: reports, explorations, a demo page, the hub."""
