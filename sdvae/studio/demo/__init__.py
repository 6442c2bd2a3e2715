"""`sdvae demo`: a page that shows a photograph's reconstruction from its latents, which can be edited.

`view` computes pictures and figures; `page` is the page that shows them.
"""
