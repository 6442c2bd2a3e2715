"""Measuring reconstructions: PSNR, SSIM, LPIPS and rFID, memory, and tables of them.

Only the standard library is imported here, so that options can be checked against these limits before torch is loaded.
"""

SMALLEST_SIDE = 16  # pixels: SSIM's window is 11 pixels wide, and LPIPS's VGG trunk halves an image four times
SMALLEST_LPIPS_SIDE = 32  # pixels, for AlexNet and SqueezeNet: with less, their last pooling has no input left
SMALLEST_MS_SSIM_SIDE = 176  # pixels: the window of 11 pixels fits after four halvings
