"""The last pipeline stage of a model with multi-token prediction and tied embeddings."""

import pytest
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_sfr.model.builder import SFRModelBuilder, SFRModelConfig
from megatron_sfr.model.local_spec import local_block_spec


@pytest.mark.usefixtures("one_rank")
@pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning")
def test_a_last_stage_has_one_copy_of_the_tied_weight() -> None:
    """Upstream builds two, of which it uses the embedding, and asserts when it saves."""
    given = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "transformer_impl": "local"}
    more = {"use_cpu_initialization": True, "cuda_graph_modules": [], "mtp_num_layers": 1}
    model = SFRModelConfig(
        transformer=TransformerConfig(**given, **more),
        vocab_size=12,
        seq_length=4,
        transformer_layer_spec=local_block_spec,
        share_embeddings_and_output_weights=True,
    )
    stage = SFRModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups(), False, True)
    assert "output_layer.weight" not in dict(stage.named_parameters())
    assert stage.sharded_state_dict()["embedding.word_embeddings.weight"].key == "embedding.word_embeddings.weight"
