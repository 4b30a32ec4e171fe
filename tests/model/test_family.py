"""Lists of a family are written out."""

from __future__ import annotations

import pytest

from aerogel import catalog
from aerogel.errors import AerogelError
from aerogel.model.family import Family


def test_lists_of_the_family_are_written_out() -> None:
    unet: Family = catalog.find("families", "unet")
    assert unet.expand_patterns(["a.*", "@ends"]) == ("a.*", "conv_in", "conv_out")
    assert {"time_embedding.*", "mid_block.resnets.*.time_emb_proj"} < set(unet.expand_patterns(["@time_path"]))
    with pytest.raises(AerogelError, match=r"the unet family has no list @end; it has @time_path, @ends, @released_tfmq"):
        unet.expand_patterns(["@end"])
    with pytest.raises(AerogelError, match="the llava family has no list @ends; it has none"):
        Family("llava", ("llava",)).expand_patterns(["@ends"])
