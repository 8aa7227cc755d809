"""BigBiGAN: discriminator heads on any image network, encoder head and losses (Donahue, Simonyan, NeurIPS 2019)."""

from paper_layers.big_bigan.discriminator import BigBiGANDiscriminator, BigBiGANHeads
from paper_layers.big_bigan.features import bn_crelu
from paper_layers.big_bigan.heads import JointHead, ProjectionScore, UnaryHead
from paper_layers.big_bigan.latent import Latent, LatentHead
from paper_layers.big_bigan.losses import discriminator_loss, encoder_generator_loss
from paper_layers.big_bigan.mlp import ResidualMLP
from paper_layers.big_bigan.penalties import r1_penalty
from paper_layers.big_bigan.scores import Scores
from paper_layers.big_bigan.spectral import SpectralLinear
from paper_layers.big_bigan.steps import StepResult, discriminator_step, encoder_generator_step

__all__ = [
    "BigBiGANDiscriminator",
    "BigBiGANHeads",
    "JointHead",
    "Latent",
    "LatentHead",
    "ProjectionScore",
    "ResidualMLP",
    "Scores",
    "SpectralLinear",
    "StepResult",
    "UnaryHead",
    "bn_crelu",
    "discriminator_loss",
    "discriminator_step",
    "encoder_generator_loss",
    "encoder_generator_step",
    "r1_penalty",
]
