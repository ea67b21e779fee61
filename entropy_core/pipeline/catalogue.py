"""All stages, by name."""

from entropy_core.pipeline import final_stages
from entropy_core.stages.altered_step import altered_step
from entropy_core.stages.calibrate import calibrate
from entropy_core.stages.compute_update import compute_update
from entropy_core.stages.discriminate import discriminate
from entropy_core.stages.dropout_u import dropout_u
from entropy_core.stages.entropy_gradient import entropy_gradient
from entropy_core.stages.first_order_e import first_order_e
from entropy_core.stages.first_order_u import first_order_u
from entropy_core.stages.half_sensitivities import half_sensitivities
from entropy_core.stages.half_steps_u import half_steps_u
from entropy_core.stages.importance import importance
from entropy_core.stages.load_checkpoint import load_checkpoint
from entropy_core.stages.load_prompts import load_prompts
from entropy_core.stages.load_weights import load_weights
from entropy_core.stages.path_integral import path_integral
from entropy_core.stages.phase_step import phase_step
from entropy_core.stages.predict import predict
from entropy_core.stages.real_step import real_step
from entropy_core.stages.recorded_u import recorded_u
from entropy_core.stages.rehearsal_step import rehearsal_step
from entropy_core.stages.rescore import rescore
from entropy_core.stages.reward import reward
from entropy_core.stages.reward_gradient import reward_gradient
from entropy_core.stages.reward_shares_u import reward_shares_u
from entropy_core.stages.sample import sample
from entropy_core.stages.score import score
from entropy_core.stages.screen import screen
from entropy_core.store.store import Stage

LOAD_CHECKPOINT = Stage("load-checkpoint", load_checkpoint)
LOAD_WEIGHTS = Stage("load-weights", load_weights)
LOAD_PROMPTS = Stage("load-prompts", load_prompts)
SAMPLE_E = Stage("sample-e-batch", sample)
SAMPLE_U = Stage("sample-u-batch", sample)
RECORDED_U = Stage("recorded-u-batch", recorded_u)
SCORE_E = Stage("score-e-batch", score)
RESCORE_E = Stage("rescore-e-batch", rescore)
SCORE_U = Stage("score-u-batch", score)
SCORE_REFERENCE = Stage("score-u-reference", score)
DISCRIMINATE_U = Stage("discriminate-u", discriminate)
REWARD_U = Stage("reward-u-batch", reward)
REWARD_E = Stage("reward-e-batch", reward)
COMPUTE_UPDATE = Stage("compute-update", compute_update)
ENTROPY_GRADIENT = Stage("entropy-gradient", entropy_gradient)
REWARD_GRADIENT = Stage("reward-gradient", reward_gradient)
REWARD_SHARES_U = Stage("reward-shares-u", reward_shares_u, vectors=("update", "gradient"))
CALIBRATE = Stage("calibrate", calibrate, vectors=("update",))
FIRST_ORDER_E = Stage("first-order-e", first_order_e, vectors=("update",))
FIRST_ORDER_U = Stage("first-order-u", first_order_u, vectors=("update", "gradient"))
HALF_STEPS_U = Stage("half-steps-u", half_steps_u, vectors=("update", "gradient"))
DROPOUT_U = Stage("dropout-u", dropout_u, vectors=("update", "gradient"))
IMPORTANCE = Stage("importance", importance, vectors=("update",))
PATH_INTEGRAL = Stage("path-integral", path_integral, vectors=("update",))
HALF_SENSITIVITIES = Stage("half-sensitivities", half_sensitivities, vectors=("update", "gradient"))
SCREEN = Stage("screen", screen)
PREDICT = Stage("predict", predict, vectors=("reward_gradient",))
ALTERED_STEP = Stage("altered-step", altered_step)
PHASE_STEP = Stage("phase-step", phase_step, vectors=("previous",))
REHEARSAL_STEP = Stage("rehearsal-step", rehearsal_step)
REAL_STEP = Stage("real-step", real_step, vectors=("update", "gradient"))
VARIANCE, PRICE, INTERVENTIONS = final_stages.VARIANCE, final_stages.PRICE, final_stages.INTERVENTIONS
PHASE, REHEARSAL, POST_MORTEM = final_stages.PHASE, final_stages.REHEARSAL, final_stages.POST_MORTEM
AGREEMENT, REPORT = final_stages.AGREEMENT, final_stages.REPORT

STAGES = tuple(value for value in dict(globals()).values() if isinstance(value, Stage))
