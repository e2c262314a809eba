"""Learners: what each does to a batch, against Pillow or against one image at a time."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor, nn

from attacks.learners.adversarial import Adversarial
from attacks.learners.cutout import Cutout, boxes
from attacks.learners.gaussian_noise import GaussianNoise
from attacks.learners.mixing import CutMix, Mixup, partners
from attacks.learners.operations import ENHANCE, GREY, OPERATIONS, SHEAR, SHIFT, operate
from attacks.learners.orthogonal_projection import OrthogonalProjection, project_out
from attacks.learners.rand_augment import RandAugment
from attacks.learners.squeezing import GaussianBlur, compressed, luma, squeezed
from bench.data.digits import Digits
from bench.dataset import Dataset, Split
from bench.errors import ConfigError
from bench.protocols import Job
from bench.registry import attacks
from bench.rng import SampleRng
from defenses.pgd_at import PGDAdversarialTraining

NO_MODEL = nn.Identity()


def streams(count: int, seed: int = 0) -> SampleRng:
    return SampleRng.create(seed, torch.arange(count), "test")


def pictures(count: int, channels: int = 3, height: int = 20, width: int = 16) -> Tensor:
    """Smooth and noisy uint8 images of few to all levels."""
    generator = torch.Generator().manual_seed(7)
    noise = torch.rand(count, channels, height, width, generator=generator)
    slope = torch.linspace(0, 1, width) * torch.linspace(0.2, 1, count)[:, None, None, None]
    return ((0.3 * noise + 0.7 * slope) * 255).to(torch.uint8)


def pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def levels(image: Image.Image) -> Tensor:
    array = torch.from_numpy(np.array(image))
    return (array[None] if array.ndim == 2 else array.permute(2, 0, 1)).int()


def perturbed(learner, x: Tensor, rng: SampleRng) -> Tensor:
    return learner.perturb(NO_MODEL, x, torch.zeros(len(x), dtype=torch.int64), rng)


@pytest.mark.parametrize(
    "learner", [Cutout(), Cutout(holes=3), GaussianNoise(), RandAugment(), RandAugment(operations=4, probability=1)]
)
class TestChanges:
    def test_a_sample_does_not_see_its_batch(self, learner):
        x, rng, rows = pictures(12) / 255, streams(12), torch.tensor([7, 2])
        torch.testing.assert_close(perturbed(learner, x, rng)[rows], perturbed(learner, x[rows], rng[rows]))

    def test_streams_decide_and_the_box_holds(self, learner):
        x = pictures(12) / 255
        out = perturbed(learner, x, streams(12))
        assert torch.equal(perturbed(learner, x, streams(12)), out)
        assert not torch.equal(perturbed(learner, x, streams(12, seed=1)), out)
        assert out.min() >= 0
        assert out.max() <= 1
        assert out.shape == x.shape


class TestCutout:
    @pytest.mark.parametrize("side", [1, 5, 8])
    def test_boxes_are_those_of_a_loop(self, side):
        count, height, width = 200, 9, 7
        x, rng = torch.zeros(count, 1, height, width), streams(count)
        found = boxes(x, torch.full((count,), side), torch.full((count,), side - 1), rng)
        rows, columns = rng.fork("row").integers(height), rng.fork("column").integers(width)
        for row in range(count):
            top, left = int(rows[row]) - side // 2, int(columns[row]) - (side - 1) // 2
            expected = torch.zeros(height, width, dtype=torch.bool)
            expected[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side - 1, 0)] = True
            assert torch.equal(found[row, 0], expected)
        assert rows.unique().numel() == height
        assert columns.unique().numel() == width

    def test_the_hole_is_black_and_nothing_else_changes(self):
        x = torch.rand(50, 3, 32, 32) * 0.9 + 0.1
        out = perturbed(Cutout(), x, streams(50))
        hole = (out == 0).all(dim=1)
        assert torch.equal(out.permute(0, 2, 3, 1)[~hole], x.permute(0, 2, 3, 1)[~hole])
        area = hole.flatten(1).sum(1)
        assert area.max() <= 16 * 16
        assert area.min() >= 8 * 8

    @pytest.mark.parametrize("wrong", [{"side": 0.0}, {"side": 1.1}, {"holes": 0}])
    def test_impossible_holes_are_refused(self, wrong):
        with pytest.raises(ConfigError):
            Cutout(**wrong)


class TestMixing:
    def batch(self, count: int = 64) -> tuple[Tensor, Tensor]:
        """Images whose every pixel is their own number, and shares that say the same."""
        number = torch.arange(count).float()
        return number[:, None, None, None].expand(-1, 3, 12, 10).contiguous(), torch.eye(count)

    def test_partners_are_a_permutation_and_no_fixed_one(self):
        first, second = partners(streams(100)), partners(streams(100, seed=1))
        assert torch.equal(first.sort().values, torch.arange(100))
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("share_of", ["sample", "batch"])
    def test_mixup_blends_images_and_labels_alike(self, share_of):
        x, shares = self.batch()
        rng = streams(64)
        mixed, labels = Mixup(share_of=share_of).mix(x, shares, rng)
        partner, share = partners(rng), rng.fork("share").uniform()
        for row in range(64):
            lam = float(share[0 if share_of == "batch" else row])
            torch.testing.assert_close(mixed[row], (1 - lam) * x[row] + lam * x[partner[row]])
            torch.testing.assert_close(labels[row], (1 - lam) * shares[row] + lam * shares[partner[row]])
        torch.testing.assert_close(labels.sum(1), torch.ones(64))

    def test_the_loss_of_shares_is_the_mean_of_two_losses(self):
        logits, y, other, lam = torch.randn(9, 5), torch.arange(9) % 5, torch.arange(9).flip(0) % 5, torch.rand(9)
        shares = torch.lerp(torch.eye(5)[y], torch.eye(5)[other], lam[:, None])
        one, two = (nn.functional.cross_entropy(logits, target, reduction="none") for target in (y, other))
        expected = ((1 - lam) * one + lam * two).mean()
        torch.testing.assert_close(nn.functional.cross_entropy(logits, shares), expected)

    def test_cutmix_labels_are_the_pasted_areas(self):
        x, shares = self.batch()
        rng = streams(64)
        mixed, labels = CutMix().mix(x, shares, rng)
        partner = partners(rng)
        for row in range(64):
            own = (mixed[row, 0] == row).float().mean()
            other = (mixed[row, 0] == partner[row]).float().mean()
            assert own + other == pytest.approx(1 if partner[row] != row else 2)
            if partner[row] != row:
                assert labels[row, row] == pytest.approx(own.item(), abs=1e-6)
                assert labels[row, partner[row]] == pytest.approx(other.item(), abs=1e-6)
                box = (mixed[row, 0] != row).nonzero()
                if len(box):
                    assert len(box) == (box.amax(0) - box.amin(0) + 1).prod()  # a box, not just some pixels

    def test_cutmix_leaves_images_alone_with_the_other_probability(self):
        count = 2000
        x, shares = torch.arange(count).float()[:, None, None, None].expand(-1, 1, 4, 4), torch.eye(count)
        mixed, _ = CutMix(probability=0.5).mix(x, shares, streams(count))
        kept = (mixed == x).all(dim=(1, 2, 3)).float().mean().item()
        empty = 0.25**2 / 2  # of the boxes that are drawn, those of less than a pixel a side are empty
        assert kept == pytest.approx(0.5 + empty, abs=4 * (0.25 / count) ** 0.5)

    def test_shares_before_the_border_are_uniform(self):
        count = 2000
        x, shares = torch.arange(count).float()[:, None, None, None].expand(-1, 1, 64, 64), torch.eye(count)
        _, labels = CutMix().mix(x, shares, streams(count))
        pasted = 1 - labels.diagonal()
        # A side of t is cut to t - t^2 / 4 on average, so an area of t^2 to its square; t^2 is uniform on [0, 1].
        t = torch.linspace(0, 1, 10001).sqrt()
        expected = (t - t**2 / 4).square().mean().item()
        assert pasted.mean().item() == pytest.approx(expected, abs=4 * pasted.std().item() / count**0.5 + 1 / 64)


class TestSqueezing:
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("quality", [10, 75])
    def test_jpeg_is_pillows(self, channels, quality):
        images = pictures(6, channels)
        for image, out in zip(images, compressed(images, quality), strict=True):
            file = io.BytesIO()
            pil(image).save(file, "JPEG", quality=quality)
            assert torch.equal(out.int(), levels(Image.open(file)))
        assert not torch.equal(compressed(images, quality), images)

    def test_jpeg_of_other_channels_is_refused(self):
        with pytest.raises(ConfigError, match="the images have 2"):
            compressed(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), 10)

    def test_luma_is_pillows(self):
        images = pictures(6)
        images[0] = torch.randint(256, images[0].shape, dtype=torch.uint8)
        for image, out in zip(images, luma(images), strict=True):
            assert torch.equal(out.int(), levels(pil(image).convert("L")))
        single = pictures(2, channels=1)
        assert torch.equal(luma(single), single)

    @pytest.mark.parametrize("name", ["grayscale", "jpeg", "bit-depth(bits=1)", "bit-depth(bits=3)"])
    def test_the_network_meets_the_squeezed_images_alone(self, name):
        seen = []

        class Spy(nn.Linear):
            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    seen.append(x.flatten(1).detach())
                return super().forward(x.flatten(1))

        images = pictures(8)
        split = Split(images, torch.arange(8) % 2)
        learner = replace(attacks.create(name), epochs=1, batch_size=8)
        learner(lambda: Spy(images[0].numel(), 2), Dataset("eight", ("a", "b"), split, split, split), Job())
        bits = {"bit-depth(bits=1)": 1, "bit-depth(bits=3)": 3}.get(name)
        if bits:
            expected = torch.stack([levels(ImageOps.posterize(pil(image), bits)) for image in images])
        elif name == "jpeg":
            expected = compressed(images, 10)
        else:
            expected = luma(images).expand(-1, 3, -1, -1)
        (batch,) = seen
        rows = {tuple(row.tolist()) for row in (batch * 255).round().int()}
        assert rows == {tuple(row.tolist()) for row in expected.flatten(1).int()}
        assert torch.equal(split.images, pictures(8))

    def test_float_images_are_rounded_to_levels(self):
        split = Split(torch.rand(4, 1, 3, 3), torch.zeros(4, dtype=torch.int64))
        data = squeezed(Dataset("floats", ("a", "b"), split, split, split), lambda images: images)
        assert data.train.images.dtype == torch.uint8
        assert (data.train.pixels() - split.images).abs().max() <= 0.5 / 255 + 1e-6

    def test_blur_is_a_mean_with_normal_weights(self):
        x = torch.rand(2, 3, 7, 6, dtype=torch.float64)
        out = GaussianBlur(kernel=3, sigma=0.8).prepare(x)
        side = np.exp(-1 / (2 * 0.8**2))
        weights = torch.tensor([side, 1, side]) / (1 + 2 * side)
        expected = (x[:, :, 1:4, 2:5] * torch.outer(weights, weights)).sum((2, 3))
        torch.testing.assert_close(out[:, :, 2, 3], expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(GaussianBlur(sigma=0.1).prepare(x), x)
        flat = torch.full((1, 1, 5, 5), 0.3)
        torch.testing.assert_close(GaussianBlur(kernel=5, sigma=2).prepare(flat), flat)

    @pytest.mark.parametrize(
        "spec", ["jpeg(quality=0)", "jpeg(quality=96)", "bit-depth(bits=0)", "bit-depth(bits=9)",
                 "gaussian-blur(kernel=2)", "gaussian-blur(sigma=0)", "gaussian-noise(sigma=0)",
                 "rand-augment(operations=0)", "rand-augment(probability=2)", "cutmix(probability=0)",
                 "orthogonal-projection(linear_epochs=0)"],
    )  # fmt: skip
    def test_impossible_settings_are_refused(self, spec):
        with pytest.raises(ConfigError):
            attacks.create(spec)


def test_noise_is_normal_and_new_for_each_stream():
    x = torch.full((8, 3, 32, 32), 0.5)
    noise = perturbed(GaussianNoise(sigma=0.05), x, streams(8)) - x  # clamped at ten deviations
    n = noise.numel()
    assert noise.mean().abs() < 4 * 0.05 / n**0.5
    assert noise.std().item() == pytest.approx(0.05, rel=4 / (2 * n) ** 0.5)
    assert (noise[0] - noise[1]).abs().mean() > 0.02


class TestOperations:
    """Each at ``LEVEL`` against Pillow's, image by image."""

    LEVEL = 0.6

    def run(self, name: str, images: Tensor, level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """The changed images in levels, and the signs that were drawn."""
        rng, count = streams(len(images)), len(images)
        operation = torch.full((count,), OPERATIONS.index(name))
        out = operate(images / 255, operation, torch.full((count,), level), rng) * 255
        torch.testing.assert_close(out, out.round(), rtol=0, atol=1e-3)
        assert out.min() >= 0
        assert out.max() <= 255.001
        return out.round().int(), rng.fork("sign").coins().int() * 2 - 1

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("identity", lambda image, sign: image),
            ("invert", lambda image, sign: ImageOps.invert(image)),
            ("equalize", lambda image, sign: ImageOps.equalize(image)),
            ("posterize", lambda image, sign: ImageOps.posterize(image, 6)),
            ("solarize", lambda image, sign: ImageOps.solarize(image, 256 * 0.4)),
            ("autocontrast", lambda image, sign: ImageOps.autocontrast(image)),
            ("brightness", lambda image, sign: ImageEnhance.Brightness(image).enhance(1 + sign * ENHANCE * 0.6)),
            ("contrast", lambda image, sign: ImageEnhance.Contrast(image).enhance(1 + sign * ENHANCE * 0.6)),
            ("color", lambda image, sign: ImageEnhance.Color(image).enhance(1 + sign * ENHANCE * 0.6)),
            ("sharpness", lambda image, sign: ImageEnhance.Sharpness(image).enhance(1 + sign * ENHANCE * 0.6)),
        ],
    )
    def test_values_are_pillows(self, name, change, channels):
        images = torch.cat([pictures(10, channels), torch.zeros(1, channels, 20, 16, dtype=torch.uint8)])
        out, signs = self.run(name, images)
        rounded = name in ("autocontrast", "brightness", "contrast", "color", "sharpness")
        assert len(signs.unique()) == 2
        for image, result, sign in zip(images, out, signs, strict=True):
            difference = (result - levels(change(pil(image), int(sign)))).abs()
            assert difference.max() <= (1 if rounded else 0)  # Pillow multiplies in its own order
            assert difference.float().mean() <= 0.05

    @pytest.mark.parametrize("name", ["shear-x", "shear-y", "translate-x", "translate-y", "rotate"])
    def test_moves_are_pillows_inside(self, name):
        images = pictures(8, height=24, width=18)
        images = torch.stack([levels(pil(image).filter(ImageFilter.GaussianBlur(2))) for image in images])
        out, signs = self.run(name, images.to(torch.uint8))
        for image, result, sign in zip(images.to(torch.uint8), out, signs, strict=True):
            amount, (height, width) = int(sign) * self.LEVEL, image.shape[1:]
            cos, sin = np.cos(np.radians(30 * amount)), np.sin(np.radians(30 * amount))
            cx, cy = width / 2, height / 2
            matrix = {
                "shear-x": (1, SHEAR * amount, -SHEAR * amount * cy, 0, 1, 0),
                "shear-y": (1, 0, 0, SHEAR * amount, 1, -SHEAR * amount * cx),
                "translate-x": (1, 0, SHIFT * amount * width, 0, 1, 0),
                "translate-y": (1, 0, 0, 0, 1, SHIFT * amount * height),
                "rotate": (cos, -sin, cx - cos * cx + sin * cy, sin, cos, cy - sin * cx - cos * cy),
            }[name]
            moved = pil(image).transform((width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR,
                                         fillcolor=(GREY,) * 3)  # fmt: skip
            frame = ImageOps.expand(Image.new("L", (width - 2, height - 2), 255), 1)  # black, to stay off the border
            inside = frame.transform(
                (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=0
            )
            kept = torch.from_numpy(np.array(inside.filter(ImageFilter.MinFilter(3)))) == 255
            assert kept.float().mean() > 0.3
            assert (result - levels(moved)).abs()[:, kept].max() <= 2

    def test_a_hole_grows_with_its_level_and_is_grey(self):
        images = pictures(20, height=32, width=32)
        for level, side in ((0.0, 0), (0.5, 10), (1.0, 20)):
            out, _ = self.run("cutout", images, level)
            changed = (out != images.int()).any(dim=1)
            assert (out.permute(0, 2, 3, 1)[changed] == GREY).all()
            assert changed.flatten(1).sum(1).max() <= side**2
            assert side == 0 or changed.flatten(1).sum(1).min() >= 0.2 * side**2

    @pytest.mark.parametrize(
        "name", [name for name in OPERATIONS if name not in ("autocontrast", "equalize", "invert")]
    )
    def test_the_lowest_level_changes_nothing(self, name):
        images = pictures(4)
        assert torch.equal(self.run(name, images, 0.0)[0], images.int())

    def test_every_image_has_its_own(self):
        images, count = pictures(len(OPERATIONS)), len(OPERATIONS)
        together = operate(images / 255, torch.arange(count), torch.full((count,), self.LEVEL), streams(count))
        for place, name in enumerate(OPERATIONS):
            alone, _ = self.run(name, images)
            assert torch.equal((together[place] * 255).round().int(), alone[place])


def test_randaugment_acts_as_often_as_it_should():
    count, p = 2000, 0.3
    x = (25 + torch.randint(218, (count, 3, 16, 16))) / 255
    changed = (perturbed(RandAugment(operations=1, probability=p), x, streams(count)) != x).flatten(1).any(1)
    expected = p * (1 - 1 / 15 / 9)  # all operations show on such images, but posterize at the lowest of nine levels
    assert changed.float().mean().item() == pytest.approx(expected, abs=4 * (p * (1 - p) / count) ** 0.5)


class TestOrthogonalProjection:
    def data(self) -> Dataset:
        """Noise, and in each class a faint pattern of its own."""
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(600) % 3
        pattern = torch.rand(3, 1, 6, 6, generator=generator)
        images = 0.5 * torch.rand(600, 1, 6, 6, generator=generator) + 0.4 * pattern[labels]
        images[:, :, 0] = 0
        split = Split(images, labels)
        return Dataset("patterns", ("a", "b", "c"), split, split, split)

    def test_nothing_is_left_along_the_directions(self):
        data = self.data()
        basis = OrthogonalProjection().directions(data, Job())
        assert basis.shape == (36, 3)
        torch.testing.assert_close(basis.T @ basis, torch.eye(3, dtype=torch.float64))
        x = data.train.pixels()
        out = project_out(x, basis)
        assert (out.flatten(1) @ basis.float()).abs().max() < 1e-4
        torch.testing.assert_close(project_out(out, basis), out, rtol=0, atol=1e-5)
        coefficients = x.flatten(1).double() @ basis
        expected = x.flatten(1).double() - sum(
            coefficients[:, [k]] * basis[:, k] for k in range(3)
        )  # one direction after the other
        torch.testing.assert_close(out.flatten(1).double(), expected, rtol=0, atol=1e-5)
        assert out.min() < 0  # and is not clipped

    def test_a_pattern_that_decides_the_class_goes(self):
        data = self.data()
        learner = OrthogonalProjection(linear_epochs=100)
        basis = learner.directions(data, Job()).float()
        x, y = data.train.pixels(), data.train.labels

        def apart(images: Tensor) -> float:
            means = torch.stack([images[y == label].mean(0) for label in range(3)])
            return (means - means.mean(0)).norm().item()

        assert apart(project_out(x, basis)) < 0.5 * apart(x)

    def test_images_with_fewer_values_than_classes_are_refused(self):
        split = Split(torch.rand(9, 1, 1, 2), torch.arange(9) % 3)
        with pytest.raises(ConfigError, match="2 values"):
            OrthogonalProjection()(nn.Flatten, Dataset("tiny", ("a", "b", "c"), split, split, split), Job())


def test_the_adversarial_learner_is_the_defense_under_another_name():
    digits = Digits()(None)
    data = digits.released(digits.train.subset(slice(200)))

    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    learner, defense = Adversarial(epochs=1, steps=2), PGDAdversarialTraining(epochs=1, steps=2)
    one, other = learner(build, data, Job()), defense(build, data, Job())
    assert torch.equal(one[1].weight, other[1].weight)
    assert learner.access == "training-data"
