"""One client of OpenAI-compatible servers for synthesis and evaluation, and the protocol that generators share."""

from hf_longalign.endpoint.address import Endpoint
from hf_longalign.endpoint.client import OpenAIGenerator
from hf_longalign.endpoint.protocol import (
    EndpointError,
    Fault,
    GenerationError,
    Generator,
    NoReplyError,
    Reply,
    Request,
    RunStopped,
    Sampling,
    SwitchGenerator,
)


__all__ = [
    "Endpoint",
    "EndpointError",
    "Fault",
    "GenerationError",
    "Generator",
    "NoReplyError",
    "OpenAIGenerator",
    "Reply",
    "Request",
    "RunStopped",
    "Sampling",
    "SwitchGenerator",
]
