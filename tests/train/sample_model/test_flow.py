"""The recipe of the flow-matching sample model: what it takes from the carried one."""

from __future__ import annotations

import torch

from train.denoising.families.registry import denoiser_of
from train.denoising.opening.loading import load_pipeline, sample_model_dir
from train.sample_model.flow import FlowModelConfig, build_flow_pipeline


def test_its_encoders_say_what_the_carried_one_says_and_it_loads_as_any_other(tmp_path):
    pipe, carried = build_flow_pipeline(FlowModelConfig(layers=1, heads=1)), load_pipeline(str(sample_model_dir()))
    ids = carried.tokenizer(["red apple", "grinning face"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = carried.text_encoder(ids)
        found = [one(ids, output_hidden_states=True) for one in (pipe.text_encoder, pipe.text_encoder_2)]
    for one in found:
        torch.testing.assert_close(one.text_embeds, expected.pooler_output, rtol=1e-5, atol=1e-5)
    norm = getattr(carried.text_encoder, "text_model", carried.text_encoder).final_layer_norm
    torch.testing.assert_close(norm(found[1].hidden_states[-2]), expected.last_hidden_state, rtol=1e-5, atol=1e-5)
    pipe.save_pretrained(tmp_path)
    denoiser = denoiser_of(load_pipeline(str(tmp_path)))
    assert denoiser.shape == (4, 16, 16) and denoiser.encode(["red apple"]).tokens == 24 + 1
