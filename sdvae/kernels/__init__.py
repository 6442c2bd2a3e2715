"""Other forms of the VAE's layers: the same function up to rounding, computed faster.

A form is a subclass of the layer that it stands in for (`sdvae.model.plain`). At each call it checks that its geometry,
methods, device and dtype still fit its kernels, and otherwise does what the layer does. `forms.py` names the forms, and
`speed.py` chooses among them, by rules or by the times that `calibration.py` measures. Only `speed_up` is used outside.
"""
