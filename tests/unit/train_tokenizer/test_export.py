from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER
from modeling.weights.opened import open_weights
from modeling.weights.tensors import write_state_dict
from tests.tiny import tiny_tokenizer
from train_tokenizer import export


def test_a_file_that_states_nothing_is_exported_as_one_that_states_nothing(tmp_path):
    config = tiny_tokenizer(encoder_width=64, encoder_heads=1, decoder_width=64, decoder_heads=1)
    write_state_dict(Tokenizer(config).state_dict(), tmp_path / "theirs.pth")
    export.main([str(tmp_path / "theirs.pth"), str(tmp_path / "ours.safetensors")])
    before, after = (
        open_weights(tmp_path / name, TOKENIZER) for name in ("theirs.pth", "ours.safetensors")
    )
    assert after.about == before.about and after.about.assumed
