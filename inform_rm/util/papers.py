"""What is not as in the papers: sentences that help, model cards and pages share; docs/ideas/papers.md has all."""

from typing import Any

GAP_DERIVED = (
    "The equation of the prompt-free gap D2 is derived from the definitions of arXiv:2504.06020, it is not the "
    "authors' text or code."
)
MOP_DIFFERS = (
    "MOP is measured in all latent dimensions with a Ledoit-Wolf covariance and, unless tail is chi2, against the "
    "reference's own distances; the authors' released code reduces latents to 75 dimensions by UMAP first and adds "
    "1e-3 to the covariance's diagonal (arXiv:2510.13694). CSI's radius comes from the reference, unless eps is given."
)
TRL_TRAINS_BT = (
    "TRL's `RewardTrainer` computes the Bradley-Terry loss itself: trained further there, an InfoRM model has no KL "
    "term, whatever `beta` says. `inform-rm train --model FOLDER` trains with it."
)


def differences_of_run(settings: dict[str, Any]) -> list[str]:
    """What a training run has otherwise than the papers, by its settings; a setting that is not known says nothing."""
    found = []
    if settings.get("architecture") == "inform":
        warmup, nats = settings.get("kl_warmup_steps"), settings.get("kl_warmup_nats")
        if warmup:
            found.append(
                f"kl_warmup_steps {warmup:g}: the KL term starts at 0 and reaches beta later"
                + (f", not before preferences earn {nats:g} nats (kl_warmup_nats)" if nats else "")
                + "; arXiv:2402.09345 has beta from the first step."
            )
        if settings.get("kl_reduction") == "averaged_moments":
            doubled = settings.get("kl_reduction_version") == 1
            found.append(
                "kl_reduction averaged_moments: the KL of the mean moments, as in the authors' released code and not "
                "in the paper; " + ("twice their term at equal beta." if doubled else "their term at equal beta.")
            )
    if settings.get("objective") == "prioritized":
        found.append(f"objective prioritized: {GAP_DERIVED} Its warm-up without selection is ours.")
    return found
