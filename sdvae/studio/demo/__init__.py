"""`sdvae demo`: a page that shows what a VAE does to a photograph, and what the decoder makes of edited latents.

`view` computes pictures and figures and knows no page; `page` puts them on one.
"""
