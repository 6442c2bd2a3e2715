"""What is measured of reconstructions: one figure an image, LPIPS, rFID, memory, tables."""
