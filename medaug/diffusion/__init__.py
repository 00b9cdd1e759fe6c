"""Diffusion on tensors and callables: schedules, parameterisations, steps, the sampling loop, guidance, perturbation."""

from medaug.diffusion.guidance import GradientGuidance, classifier_free, classifier_free_noise, score_guided_noise
from medaug.diffusion.inversion import Replay, Trajectory, cycle_inversion, ddim_inversion, start_timesteps
from medaug.diffusion.objective import P2, WEIGHTINGS, EDMWeight, MinSNR, Uniform, with_weighting
from medaug.diffusion.parameterisation import (
    EDM,
    PARAMETERISATIONS,
    Epsilon,
    Level,
    Parameterisation,
    Prediction,
    Sample,
    Velocity,
    add_noise,
    make_level,
    noise_from_x_0,
    x_0_from_noise,
)
from medaug.diffusion.perturbation import LOCATIONS, PERTURBED_TERMS, Perturbation, PerturbedState, bottleneck_noise
from medaug.diffusion.sampler import sample
from medaug.diffusion.schedule import SCHEDULES, NoiseSchedule, make_schedule, pairs, spaced_timesteps
from medaug.diffusion.steps import DDIM, STEPS, Ancestral, DPMSolverPP2M, Step, ddim_step, ddpm_step, dpm_solver_pp_2m_step

__all__ = [
    "DDIM",
    "EDM",
    "P2",
    "PARAMETERISATIONS",
    "SCHEDULES",
    "STEPS",
    "WEIGHTINGS",
    "Ancestral",
    "DPMSolverPP2M",
    "EDMWeight",
    "Epsilon",
    "GradientGuidance",
    "LOCATIONS",
    "Level",
    "MinSNR",
    "NoiseSchedule",
    "PERTURBED_TERMS",
    "Parameterisation",
    "Perturbation",
    "PerturbedState",
    "Prediction",
    "Replay",
    "Sample",
    "Step",
    "Trajectory",
    "Uniform",
    "Velocity",
    "add_noise",
    "bottleneck_noise",
    "classifier_free",
    "classifier_free_noise",
    "cycle_inversion",
    "ddim_inversion",
    "ddim_step",
    "ddpm_step",
    "dpm_solver_pp_2m_step",
    "make_level",
    "make_schedule",
    "noise_from_x_0",
    "pairs",
    "sample",
    "score_guided_noise",
    "spaced_timesteps",
    "start_timesteps",
    "with_weighting",
    "x_0_from_noise",
]
