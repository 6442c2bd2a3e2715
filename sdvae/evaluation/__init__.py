"""`sdvae evaluate`: measuring VAEs side by side."""
