"""The page's form, without the page."""

from turbojax.app.web.form import first_values, read_form
from turbojax.config import base_config


def test_int8_off_leaves_out_the_servers_scheme():
    config = base_config(weights="demo", quant_linear=True, quant_scheme="channel")
    values = first_values(config) | {"prompt": "a cat"}
    assert read_form(config, values).quant_scheme == "channel"
    off = read_form(config, values | {"quant_linear": "off"})
    assert (off.quant_linear, off.quant_scheme) == (False, None)
