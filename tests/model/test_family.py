"""Lists of a family are written out, and conditions on the config are read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.family import Edge, Family, Residual

LLAVA: Family = catalog.find("families", "llava")


def test_lists_of_the_family_are_written_out() -> None:
    unet: Family = catalog.find("families", "unet")
    assert unet.expand_patterns(["a.*", "@ends"]) == ("a.*", "conv_in", "conv_out")
    assert {"time_embedding.*", "mid_block.resnets.*.time_emb_proj"} < set(unet.expand_patterns(["@time_path"]))
    with pytest.raises(AerogelError, match=r"the unet family has no list @end; it has @time_path, @ends, @released_tfmq"):
        unet.expand_patterns(["@end"])
    with pytest.raises(AerogelError, match="the llava family has no list @ends; it has none"):
        LLAVA.expand_patterns(["@ends"])


def test_conditions_ask_the_config() -> None:
    when = (("activation", "relu"), ("extra_width", None))
    for part in (Edge("fc1", ("fc2",), when=when), Residual((), (), "norm", "head", when=when)):
        assert part.holds(SimpleNamespace(activation="relu", extra_width=None))
        assert part.holds(SimpleNamespace(activation="relu"))
        assert not part.holds(SimpleNamespace(activation="gelu"))
        assert not part.holds(None)
    assert Edge("fc1", ("fc2",)).holds(None)
