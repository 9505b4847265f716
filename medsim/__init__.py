__version__ = "0.1.0"

from .envs.registration import register_envs

register_envs()
