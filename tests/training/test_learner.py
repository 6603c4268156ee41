import copy

import numpy as np
import pytest
import torch

from charmlib import charm_learner
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders
from tests.training.conftest import HALF, NET


def test_fastais_own_methods_work(learn, phantoms):
    import matplotlib.pyplot as plt

    first_file = next(phantoms.rglob("*.png"))
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(1, 1e-3, freeze_epochs=1)
        learn.fit_one_cycle(1, slice(1e-5, 1e-3))
        loss, auc, ap = learn.validate()
        assert np.isfinite(loss) and 0 < auc < 1 and 0 < ap < 1
        logits, labels = learn.get_preds()
        assert logits.shape == labels.shape and logits.min() >= 0 and logits.max() <= 1  # the loss's activation
        learn.show_results(max_n=2)
        decoded, _, probabilities = learn.predict(first_file)
        assert len(probabilities) == 14 and set(decoded) <= set(learn.dls.vocab)
    lrs = [g["lr"] for g in learn.opt.hypers]
    assert lrs == sorted(lrs) and len(set(lrs)) == 3  # discriminative
    plt.close("all")


def test_images_from_elsewhere_are_not_taken_for_rows_of_the_data(learn, phantoms):
    """The same picture many times: its answer must not depend on where in the list it stands."""
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        picture = next(phantoms.rglob("*.png"))
        probabilities, _ = learn.get_preds(dl=learn.dls.test_dl([picture] * 320))
    assert learn.model.bank.filled.item() == 16
    torch.testing.assert_close(probabilities, probabilities[:1].expand_as(probabilities), rtol=1e-5, atol=1e-6)


def test_lr_find_restores_everything_and_leaves_no_file(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        before = copy.deepcopy(learn.model.state_dict())
        files = sorted(learn.path.rglob("*"))
        found = learn.lr_find(num_it=20, show_plot=False).valley
    assert 1e-7 < found < 10
    for name, value in learn.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert sorted(learn.path.rglob("*")) == files


def test_freeze_leaves_only_new_layers_and_norms_and_never_wakes_the_momentum_branch(learn):
    learn.freeze()
    kinds = {n for n, p in learn.model.named_parameters() if p.requires_grad and not n.startswith(("head", "attention"))}
    modules = dict(learn.model.named_modules())
    assert all("Norm" in type(modules[n.rpartition(".")[0]]).__name__ for n in kinds)
    learn.unfreeze()
    assert all(p.requires_grad != n.startswith("momentum.") for n, p in learn.model.named_parameters())


def test_slots_know_their_images_and_labels(learn):
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    bank, data = learn.model.bank, learn.dls.train.dataset
    ids = bank.slot_ids[: bank.filled].tolist()
    assert ids and set(ids) <= set(data.rows.tolist())
    for slot, row in enumerate(ids):
        assert bank.slot_labels[slot].tolist() == data.labels[row].tolist()


def test_each_epoch_has_an_order_and_an_augmentation_of_its_own_and_a_second_fit_repeats_them(learn):
    from fastai.callback.core import Callback

    class Batches(Callback):
        def before_batch(self):
            if self.training:
                epochs.setdefault(self.epoch, {}).update(zip(self.dl.ids.tolist(), self.x.as_subclass(torch.Tensor).clone()))

    seen = []
    for _ in range(2):
        epochs = {}
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=Batches())
        seen.append(epochs)
    first, second = seen[0].values()
    assert list(first) != list(second)
    both = first.keys() & second.keys()
    assert len(both) > 50 and not any(torch.equal(first[i], second[i]) for i in both)
    for epoch, again in zip(*(epochs.values() for epochs in seen)):
        assert list(epoch) == list(again) and all(torch.equal(epoch[i], again[i]) for i in epoch)


def test_momentum_moves_after_each_step_but_not_after_a_skipped_one(learn):
    from fastai.callback.core import Callback, CancelStepException

    class Overflow(Callback):
        """What the gradient scaler does when gradients overflow: fastai calls after_step nonetheless."""

        order = 10

        def before_step(self):
            if self.train_iter % 3 == 0:
                raise CancelStepException

    steps = len(learn.dls.train)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        assert learn.model.momentum.updates.item() == steps
        learn.fit(1, 1e-3, cbs=Overflow())
    skipped = len([i for i in range(steps) if i % 3 == 0])
    assert learn.model.momentum.updates.item() == 2 * steps - skipped


def test_no_method_of_the_network_is_called_like_a_training_event(learn):
    """Callbacks pass unknown names on to the Learner, and that to the model: a method `after_step` of the network was
    called once for every callback, a dozen times a step."""
    from fastai.callback.core import event

    events = [name for name in vars(event) if not name.startswith("_")]
    assert "after_step" in events
    assert not [name for name in events if hasattr(learn.model, name)]


def test_momentum_follows_the_new_weights_not_the_old(learn):
    """One step at momentum 0 must leave the branch equal to the block after the optimizer moved it."""
    learn.model.momentum.momentum = 0.0
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    for name, value in learn.model.final.state_dict().items():
        assert torch.equal(value, learn.model.momentum.encoder.state_dict()[name]), name


def test_data_and_network_must_agree(phantoms, tmp_path):
    data = open_dataset(data_root=str(phantoms), image_size=32)
    dls = chest_dataloaders(data, bs=16, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with pytest.raises(ValueError, match=r"mean=net\.mean"):
        charm_learner(dls, path=tmp_path, **NET)
    with pytest.raises(RuntimeError, match="needs a GPU"):
        dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF)
        charm_learner(dls, path=tmp_path, precision="fp16", **NET)


def test_the_network_of_a_learner_has_the_values_it_was_given(learn):
    net = charm_learner(learn.dls, **{**NET, "momentum": 0.123, "threshold": 0.321, "vote_weight": 0.77}).model
    assert (net.momentum.momentum, net.bank.threshold, net.bank.weight) == (0.123, 0.321, 0.77)


def test_the_suites_own_loss_reaches_the_learner(learn):
    assert type(learn.loss_func).__name__ == "BCELoss"
    assert learn.loss_func.decodes(torch.tensor([0.2, 0.8])).tolist() == [False, True]
