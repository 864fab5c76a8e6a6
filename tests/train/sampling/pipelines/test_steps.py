"""What a step is: schedulers that evaluate the model several times a step, and terms that count."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler, PNDMScheduler

from tests.train.sampling.pipelines.test_pipelines import seeds, with_scheduler
from train.denoising.opening.loading import load_pipeline
from train.sampling import AttractionBasin, GuidedStableDiffusion, NoiseAdjustment
from train.sampling.config import SampleConfig
from train.sampling.job.job import run_sample


@pytest.mark.parametrize(
    ("name", "options", "numbers"),
    [
        ("DDIMScheduler", {}, [0, 1, 2, 3]),
        ("HeunDiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
        ("KDPM2DiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
        ("KDPM2AncestralDiscreteScheduler", {}, [0, 0, 1, 1, 2, 2, 3]),
        ("PNDMScheduler", {"skip_prk_steps": True}, [0, 0, 1, 2, 3]),
        ("PNDMScheduler", {"skip_prk_steps": False}, [0] * 4 + [1] * 4 + [2] * 4 + [3]),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, [0, 1, 2, 3]),
    ],
)
def test_evaluations_that_refine_a_step_have_its_number(tiny_pipe, name, options, numbers):
    _, guided = with_scheduler(tiny_pipe, name, **options)
    trace = guided("red apple", generator=seeds(1), num_inference_steps=4, output_type="latent").trace
    assert [row["number"] for row in trace] == numbers
    assert [row["step"] for row in trace] == list(range(len(numbers)))  # every evaluation has its row


def test_a_repeated_timestep_is_no_new_step_whatever_the_scheduler(tiny_pipe):
    guided = GuidedStableDiffusion.from_pipe(tiny_pipe, scheduler=Repeating.from_config(tiny_pipe.scheduler.config))
    trace = guided("red apple", generator=seeds(1), num_inference_steps=3, output_type="latent").trace
    assert [row["number"] for row in trace] == [0, 0, 1, 1, 2, 2]


class Repeating(DDIMScheduler):
    """Evaluates at each timestep twice, and does not say so."""

    def set_timesteps(self, *args, **kwargs):
        super().set_timesteps(*args, **kwargs)
        self.timesteps = self.timesteps.repeat_interleave(2)


@pytest.mark.parametrize(
    ("kind", "options"), [(PNDMScheduler, {"skip_prk_steps": True}), (HeunDiscreteScheduler, {})]
)
def test_repeated_evaluations_are_no_minima_of_the_magnitude(sample_model, kind, options):
    """The basin is left at the first minimum over the steps, as under DDIM, and none of these at t ≥ 800."""
    pipe = load_pipeline(str(sample_model))
    guided = GuidedStableDiffusion.from_pipe(pipe, scheduler=kind.from_config(pipe.scheduler.config, **options))
    guided.set_progress_bar_config(disable=True)
    prompts = ["red apple, food fruit", "dog face, animal mammal"]
    call = {"num_inference_steps": 25, "guidance_scale": 4.0, "output_type": "latent"}
    trace = guided(prompts, generator=seeds(1, 3), guidance=[AttractionBasin()], **call).trace
    for image in (0, 1):
        rows = [row for row in trace if row["image"] == image]
        m = [next(row["magnitude"] for row in rows if row["number"] == number) for number in range(25)]
        minima = [i + 1 for i in range(1, 24) if m[i - 1] > m[i] < m[i + 1]]
        assert minima or image == 1
        first = min(minima, default=25)
        assert {row["number"] for row in rows if row["inside"]} == set(range(first))
        assert min(row["t"] for row in rows if row["inside"]) < 800


def test_the_evaluations_of_a_step_are_guided_alike_on_either_side_of_a_static_transition_point(tiny_pipe):
    _, guided = with_scheduler(tiny_pipe, "HeunDiscreteScheduler")
    call = {"generator": seeds(1), "num_inference_steps": 5, "output_type": "latent"}
    t = guided("red apple", **call).trace[3]["t"]  # of the step numbered 2, and of the refinement before it
    trace = guided("red apple", guidance=[AttractionBasin(until=t + 1)], **call).trace
    assert [row["inside"] for row in trace] == [True] * 4 + [False] * 5


@pytest.mark.parametrize(("name", "delayed"), [("DDIMScheduler", 2), ("HeunDiscreteScheduler", 4)])
def test_a_delay_is_one_of_steps(tiny_pipe, name, delayed):
    _, guided = with_scheduler(tiny_pipe, name)
    term = NoiseAdjustment(method="batch", delay=2)
    trace = guided("red apple", generator=seeds(1), num_inference_steps=4, guidance=[term], output_type="latent").trace
    assert [row["fired"] == ["delay"] for row in trace] == [i < delayed for i in range(len(trace))]
    assert [row["scale"] for row in trace[:delayed]] == [0.0] * delayed and trace[-1]["scale"] == 7.5


def test_steps_that_fired_are_steps(tmp_path, sample_model):
    import pyarrow.parquet as parquet

    (tmp_path / "prompts.txt").write_text("red apple\n")
    config = SampleConfig(
        str(sample_model), str(tmp_path / "prompts.txt"), str(tmp_path / "out"), guidance="noise-batch", seeds=1,
        steps=4, scheduler="HeunDiscreteScheduler", device="cpu",
    )  # fmt: skip
    config.noise.delay = 3
    run_sample(config)
    assert parquet.read_table(tmp_path / "out" / "samples.parquet")["steps_fired"].to_pylist() == [3]
    assert torch.tensor(parquet.read_table(tmp_path / "out" / "trace.parquet")["number"].to_pylist()).max() == 3
