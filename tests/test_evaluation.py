"""Figures of an evaluation against numbers worked out by hand or by torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erq.evaluation import Evaluation, evaluate, likeliest


class Readout(nn.Module):
    """Logits are the first pixel of every channel, so that images are logits."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0] * self.gain


class Returns(nn.Module):
    """Returns what it was given."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value


class Shifted(Readout):
    """Readout with other classes in front."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0].roll(1, dims=1)


def as_images(logits: Tensor) -> Tensor:
    return logits[:, :, None, None]


def test_accuracy_by_hand() -> None:
    ranks = torch.arange(7.0).expand(4, 7)  # classes 6, 5, 4, … in this order
    labels = torch.tensor([6, 5, 2, 0])
    found = evaluate(Readout(), [(as_images(ranks), labels)])
    assert found == Evaluation(n=4, top1=25.0, top5=75.0)


def test_top5_of_fewer_classes_counts_them_all() -> None:
    found = evaluate(Readout(), [(as_images(torch.randn(3, 4)), torch.tensor([0, 1, 3]))])
    assert found.top5 == 100.0


def test_closeness_against_torch() -> None:
    logits = torch.randn(50, 9)
    other = Readout(gain=0.7)
    reference = Shifted()
    found = evaluate(other, as_images(logits), reference=reference)
    q, p = (0.7 * logits).double(), logits.roll(1, dims=1).double()
    kl = nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True
    )
    assert found.kl == pytest.approx(float(kl), rel=1e-6)
    sqnr = 10 * math.log10(float(p.square().sum() / (p - q).square().sum()))
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-6)
    same = 100 * float((p.argmax(1) == q.argmax(1)).double().mean())
    assert found.agreement == pytest.approx(same)
    assert (found.top1, found.top5, found.reference_top1) == (None, None, None)


def test_equal_networks_agree_entirely() -> None:
    labels = torch.tensor([0, 1, 2])
    images = as_images(torch.eye(3))
    found = evaluate(Readout(), [(images, labels)], reference=Readout())
    assert found == Evaluation(3, 100.0, 100.0, 100.0, 0.0, math.inf, 100.0)


def test_reference_accuracy_is_its_own() -> None:
    images, labels = as_images(torch.eye(4)), torch.arange(4)
    found = evaluate(Shifted(), [(images, labels)], reference=Readout())
    assert (found.top1, found.reference_top1, found.agreement) == (0.0, 100.0, 0.0)


def test_streamed_batches_give_what_one_batch_gives() -> None:
    images, labels = as_images(torch.randn(70, 6)), torch.randint(6, (70,))
    whole = evaluate(Readout(), [(images, labels)], reference=Shifted())
    parts = zip(images.split(11), labels.split(11), strict=True)
    streamed = evaluate(Readout(), parts, reference=Shifted())
    for name, value in whole.to_dict().items():
        assert getattr(streamed, name) == pytest.approx(value, rel=1e-9), name


def test_tuple_of_logits_is_averaged() -> None:
    pair = (torch.tensor([[3.0, 0.0, 0.0]]), torch.tensor([[-2.0, 1.5, 0.0]]))
    images, labels = torch.zeros(1, 3, 2, 2), torch.tensor([1])
    assert evaluate(Returns(pair), [(images, labels)]).top1 == 100.0
    assert evaluate(Returns(pair[0]), [(images, labels)]).top1 == 0.0


def test_runs_in_evaluation_mode_and_restores_the_mode() -> None:
    net = nn.Sequential(nn.Dropout(0.9), Readout())
    reference = Readout().eval()
    found = evaluate(net.train(), as_images(torch.randn(20, 5)), reference=reference)
    assert found.agreement == 100.0
    assert net.training and not reference.training


def test_half_precision_network_gets_half_precision_images() -> None:
    seen: list[torch.dtype] = []

    class Spy(Readout):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return super().forward(x)

    evaluate(Spy().half(), as_images(torch.randn(2, 5)), reference=Spy())
    assert seen == [torch.float16, torch.float32]


def test_images_are_checked_against_the_model(tiny_vit: Callable[..., nn.Module]) -> None:
    net = tiny_vit()
    assert evaluate(net, torch.randn(3, 3, 16, 16), reference=net).agreement == 100.0
    with pytest.raises(ValueError, match="4 channels, the model takes 3"):
        evaluate(net, torch.randn(3, 4, 16, 16), reference=net)
    with pytest.raises(ValueError, match="20×16, the model takes 16×16"):
        evaluate(net, torch.randn(3, 3, 20, 16), reference=net)
    with pytest.raises(ValueError, match=r"reference .* images are 16×16, the model takes 24×24"):
        evaluate(net, torch.randn(3, 3, 16, 16), reference=tiny_vit(img_size=24))


IMAGES = torch.zeros(2, 3, 1, 1)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no images"),
        (IMAGES[:0], "no images"),
        (7, "iterable"),
        (["text"], "got str"),
        (IMAGES.int(), "float tensor"),
        (IMAGES / 0, "NaN or infinite values, first in image 0"),
        ([(IMAGES, [0, 3])], "label 3 is none of the network's classes 0..2"),
        ([(IMAGES, [0, -1])], "label -1"),
        ([(IMAGES, [0])], r"2 images need labels \[2\], got \[1\]"),
        ([(IMAGES, [0.0, 1.0])], "integers"),
        ([(IMAGES, ["cat", "dog"])], "integers"),
        ([(IMAGES, [0, 1]), IMAGES], "only 2 of 4 images have labels"),
    ],
)
def test_bad_input_is_one_clear_error(batches: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Readout(), batches)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.zeros(2, 3, 4), r"logits \[N, classes\], got \[2, 3, 4\]"),
        ({"logits": 1}, "got dict"),
        (torch.full((2, 3), math.nan), "the network returned NaN"),
    ],
)
def test_bad_output_is_one_clear_error(output: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Returns(output), IMAGES)


def test_reference_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 classes, the reference 4"):
        evaluate(Readout(), IMAGES, reference=Returns(torch.zeros(2, 4)))


def test_likeliest_classes_with_their_names() -> None:
    net: Any = Readout()
    net.num_classes, net.pretrained_cfg = 3, {"label_names": ["cat", "dog", "owl"]}
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, 1.0]])
    found = likeliest(net, as_images(logits), count=2)
    assert [[t["name"] for t in top] for top in found] == [["dog", "owl"], ["cat", "owl"]]
    expected = logits.double().softmax(1)[0].tolist()
    assert [t["probability"] for t in found[0]] == pytest.approx([expected[1], expected[2]])
    assert len(likeliest(net, as_images(logits))[0]) == 3
    net.pretrained_cfg = {"label_names": ["too", "few"]}
    assert likeliest(net, as_images(logits), 1)[0][0] == {
        "class": 1, "name": None, "probability": pytest.approx(expected[1]),
    }  # fmt: skip
