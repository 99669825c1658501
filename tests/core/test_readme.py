"""The README's table is the settings; its code is run by tests/live/test_readme_code.py."""

import re
from pathlib import Path

from vllm_embed import Settings

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_table_has_every_setting_with_its_default() -> None:
    section = README.read_text("utf8").split("## Settings")[1].split("##")[0]
    table = dict(re.findall(r"^\| (`[a-z_`, ]+`) \| (.+?) \|", section, re.MULTILINE))
    told = {name: default for names, default in table.items() for name in re.findall("`([a-z_]+)`", names)}
    assert list(told) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if field.default_factory is None:
            default = told[name].strip("`").replace(",", "")
            assert default in (repr(field.default), f'"{field.default}"'), name
