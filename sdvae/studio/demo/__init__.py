"""`sdvae demo`: a page that shows a photograph's reconstruction, also from latents that were edited.

`view` computes pictures and figures; `page` is the page that shows them.
"""
