"The losses: gradients, void, weights, and what each equals in a case that can be reckoned by hand"
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from synseg.losses import (CrossEntropyLoss, DiceLoss, FocalLoss, LovaszSoftmaxLoss, lovasz_gradient,
                           median_frequency_weights, sqrt_frequency_weights)
from synseg.metrics import ConfusionMatrix

K = 5
WEIGHT = [0.5, 1.0, 2.0, 0.0, 3.0]
LOSSES = {f"{cls.__name__}-{name}": cls(weight=weight, **extra)
          for cls, extra in ((CrossEntropyLoss, {}), (FocalLoss, {}), (DiceLoss, {}), (LovaszSoftmaxLoss, {}))
          for name, weight in (("plain", None), ("weighted", WEIGHT))}
LOSSES |= {"focal-half": FocalLoss(gamma=0.5), "lovasz-per-image": LovaszSoftmaxLoss(per_image=True)}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


def batch(dtype=torch.float32, void=0.2, size=(5, 7)):
    labels = torch.randint(0, K, (2, *size))
    labels[torch.rand(labels.shape) < void] = 255
    return torch.randn(2, K, *size, dtype=dtype, requires_grad=True), labels


@every_loss
def test_gradient(loss):
    logits, labels = batch(torch.float64)
    assert gradcheck(lambda z: loss(z, labels), logits)


@every_loss
def test_all_void_is_zero_with_zero_gradient(loss):
    logits, labels = batch()
    value = loss(logits, torch.full_like(labels, 255))
    value.backward()
    assert value.item() == 0 and (logits.grad == 0).all()


@every_loss
def test_void_pixels_do_not_matter(loss):
    logits, labels = batch()
    value = loss(logits, labels)
    (gradient,) = torch.autograd.grad(value, logits)
    void = (labels == 255)[:, None].expand_as(logits)
    assert (gradient[void] == 0).all() and gradient[~void].abs().sum() > 0
    torch.testing.assert_close(loss(logits.masked_fill(void, 7.0), labels), value)


@every_loss
def test_saturated_logits_stay_finite(loss):
    logits, labels = batch()
    big = (logits.detach() * 1e4).requires_grad_()
    value = loss(big, labels)
    value.backward()
    assert value.isfinite() and big.grad.isfinite().all()
    perfect = (1e3 * F.one_hot(labels.masked_fill(labels == 255, 0), K).movedim(-1, 1).float()).requires_grad_()
    assert loss(perfect, labels).item() == pytest.approx(0, abs=1e-6)


@every_loss
def test_half_precision_logits_and_odd_sizes(loss):
    logits, labels = batch(size=(1, 3))
    assert loss(logits.bfloat16(), labels).dtype == torch.float32
    assert loss(logits, labels.to(torch.uint8)) == loss(logits, labels)


@every_loss
def test_bad_input_is_explained(loss):
    logits, labels = batch()
    with pytest.raises(ValueError, match="Upsample the logits"):
        loss(logits[..., :3], labels)
    with pytest.raises(ValueError, match="integers"):
        loss(logits, labels.float())
    for value in (K, -1):
        with pytest.raises(ValueError, match=f"label value {value} found"):
            loss(logits, labels.masked_fill(labels == 0, value))
    if loss.weight is not None:
        with pytest.raises(ValueError, match="5 class weights found; the logits have 4"):
            loss(logits[:, :4], labels.clamp(max=3))


def test_bad_weights_are_explained():
    for weight in ([1.0, -1.0], [1.0, float("nan")], [[1.0]]):
        with pytest.raises(ValueError, match="class weights"):
            CrossEntropyLoss(weight)
    with pytest.raises(ValueError, match="gamma"):
        FocalLoss(gamma=-1)


@pytest.mark.parametrize("weight", [None, torch.tensor(WEIGHT)])
def test_cross_entropy_equals_pytorch(weight):
    logits, labels = batch()
    torch.testing.assert_close(CrossEntropyLoss(weight)(logits, labels), F.cross_entropy(logits, labels, weight, ignore_index=255))


def test_pixel_weight():
    logits, labels = batch()
    weight = torch.rand(labels.shape)
    nll, known = F.cross_entropy(logits, labels, ignore_index=255, reduction="none"), labels != 255
    torch.testing.assert_close(CrossEntropyLoss()(logits, labels, weight), (nll * weight).sum() / weight[known].sum())
    torch.testing.assert_close(CrossEntropyLoss(WEIGHT)(logits, labels, torch.ones_like(weight)), CrossEntropyLoss(WEIGHT)(logits, labels))
    assert CrossEntropyLoss()(logits, labels, weight * 0).item() == 0


def test_focal_is_cross_entropy_at_zero_and_smaller_above():
    logits, labels = batch()
    torch.testing.assert_close(FocalLoss(0)(logits, labels), CrossEntropyLoss()(logits, labels))
    values = [FocalLoss(g)(logits, labels).item() for g in (0, 0.5, 1, 2, 5)]
    assert values == sorted(values, reverse=True)


def test_dice_by_hand():
    p = torch.tensor([0.9, 0.2, 0.6])
    labels = torch.tensor([[[1, 0, 1]]])
    logits = torch.stack([1 - p, p]).log()[None, :, None]
    one = 1 - 2 * (0.9 + 0.6) / (2 + 0.81 + 0.04 + 0.36)
    zero = 1 - 2 * 0.8 / (1 + 0.01 + 0.64 + 0.16)
    assert DiceLoss()(logits, labels).item() == pytest.approx((one + zero) / 2, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_predictions(dtype):
    pred, labels = torch.randint(0, K, (2, 9, 11)), torch.randint(0, K, (2, 9, 11))
    labels[:, 0] = 255
    logits = 1e3 * F.one_hot(pred, K).movedim(-1, 1).to(dtype)
    matrix = ConfusionMatrix(K).update(pred, labels)
    assert LovaszSoftmaxLoss()(logits, labels).item() == pytest.approx(1 - matrix.mean_iou(), abs=1e-6)
    dice = 2 * matrix.iou() / (1 + matrix.iou())
    assert DiceLoss()(logits, labels).item() == pytest.approx(1 - dice.mean().item(), abs=1e-6)
    assert LovaszSoftmaxLoss(per_image=True)(logits, labels).item() == pytest.approx(1 - matrix.per_image_mean_iou(), abs=1e-6)


def test_lovasz_gradient_telescopes_and_radix_order_is_exact():
    truth = (torch.rand(4, 50, dtype=torch.float64) < 0.3).double()
    truth[:, 0] = 1
    torch.testing.assert_close(lovasz_gradient(truth).sum(1), torch.ones(4, dtype=torch.float64))
    logits, labels = batch()
    loss = LovaszSoftmaxLoss()
    torch.testing.assert_close(loss(logits, labels).double(), loss(logits.double(), labels), rtol=1e-5, atol=1e-6)


def test_class_weights_from_counts():
    weight = median_frequency_weights(torch.tensor([60, 30, 10]), torch.tensor([100, 100, 50]))
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.0, 1.5]))
    weight = sqrt_frequency_weights(torch.tensor([400, 100, 0]))
    torch.testing.assert_close(weight / weight[0], torch.tensor([1.0, 2.0, 2.0]))
    assert weight.mean().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="no labelled pixel"):
        sqrt_frequency_weights(torch.zeros(3))
