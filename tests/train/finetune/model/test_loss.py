"""The loss: what each sample counts."""

from __future__ import annotations

import torch

from train.finetune.model.loss import counted, min_snr_weights, sample_errors, weighted_loss


def test_a_kept_sample_weighs_the_same_whatever_else_is_dropped():
    losses = torch.tensor([1.0, 2.0, 4.0, float("nan")], requires_grad=True)
    weighted_loss(losses, torch.tensor([1.0, 0.0, 1.0, 0.0]), nominal_batch=4).backward()
    assert losses.grad.tolist() == [0.25, 0, 0.25, 0]


def test_min_snr_weights_weigh_the_error_of_x0_alike_whatever_the_model_predicts():
    # An error d of x̂_0 is an error √(ᾱ/(1−ᾱ)) d of ε and d/√(1−ᾱ) of v.
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.01])
    snr = alpha_bar / (1 - alpha_bar)
    for kind, per_x0 in (("epsilon", snr), ("v_prediction", 1 / (1 - alpha_bar))):
        weights = min_snr_weights(snr, kind, gamma=5.0)
        torch.testing.assert_close(weights * per_x0, snr.clamp(max=5.0))
    assert min_snr_weights(torch.tensor([0.0, 1.0]), "epsilon", 5.0).tolist() == [1.0, 1.0]
    assert min_snr_weights(torch.tensor([0.0, 1.0]), "v_prediction", 5.0).tolist() == [0.0, 0.5]
    assert min_snr_weights(snr, "epsilon", 0.0).tolist() == [1.0] * 4


def test_what_is_not_finite_and_does_not_count_leaves_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    output = inputs * weight + torch.tensor([[0.0, 0.0], [float("nan"), float("inf")]])
    weights = torch.tensor([1.0, 0.0])
    losses = sample_errors(counted(output, weights), torch.zeros(2, 2))
    assert losses.isnan().tolist() == [False, True]  # as it is, for the log
    weighted_loss(losses, weights, nominal_batch=1).backward()
    assert weight.grad.tolist() == [1.0, 4.0]
