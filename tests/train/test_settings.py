"""Settings of training: each has a range, and what is outside of it is one sentence that names it."""

import math
import re

import pytest
from ml_collections import ConfigDict

from turbojax.config import as_json
from turbojax.errors import UserError
from turbojax.json_reader import Boolean, Integer, Number
from turbojax.train.config import RANGES, TRAIN_SETTINGS, check_settings, train_config

GIVEN = {"workdir": "run", "data": "data", "weights": "random"}
NUMBERS = [name for name, schema in RANGES.items() if isinstance(schema, Integer | Number)]
NEVER = (-1e30, 1e30, math.nan, math.inf, 10**400, "many", None, True, (1,))


def with_setting(name: str, value: object):
    return ConfigDict(train_config(**GIVEN).to_dict() | {name: value})  # without the types of the defaults


def test_every_setting_has_a_range():
    assert set(RANGES) == {setting.name for setting in TRAIN_SETTINGS}
    for name, value in train_config(**GIVEN).items():
        RANGES[name].check(as_json(value), name)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range(name):
    schema = RANGES[name]
    least = -1 if schema.minimum == 0 else schema.minimum - 1
    outside = (*NEVER, least, schema.maximum + 1, *((0.5,) if isinstance(schema, Integer) else ()))
    for value in outside:
        with pytest.raises(UserError, match=rf"^{name} is .* and must be a (whole )?number") as caught:
            check_settings(with_setting(name, value))
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", sorted(set(RANGES) - set(NUMBERS) - set(GIVEN)))
def test_other_values_that_cannot_be(name):
    wrong = [1.5, (1, "x"), 10**400]
    wrong += ["yes"] if isinstance(RANGES[name], Boolean) else [True]
    for value in wrong:
        with pytest.raises(UserError, match=rf"^{name}(\[\d\])? is .* and must be "):
            check_settings(with_setting(name, value))


@pytest.mark.parametrize("blocks", [(64,), (64, 64, 64), (0, 64), (64, -1), (64, 10**30), (), ("a", 2), 64, (True, 64)])
def test_blocks_of_sla(blocks):
    with pytest.raises(UserError, match=r"^sla_blocks(\[\d\])? is .* and must be"):
        check_settings(with_setting("sla_blocks", blocks))


@pytest.mark.parametrize("value", [0, "x", (1, 2), ((5,),), ((5, 48, 3),), ((5, "a"),), ((0, 48),)])
def test_crops(value):
    with pytest.raises(UserError, match=r"^crops(\[\d\])* is .* and must be"):
        check_settings(with_setting("crops", value))


def test_mesh():
    for value in (0, -2, 10**30, "all"):
        with pytest.raises(UserError, match=re.escape("-1 or a whole number of devices")):
            check_settings(with_setting("fsdp", value))
