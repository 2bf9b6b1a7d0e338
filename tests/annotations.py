"""Checks the shapes and dtypes that jdam's annotations claim, wherever its functions are called or
traced in the tests. What other arguments may be jdam's own errors say."""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, of jaxtyping's annotations alone."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if _tells_of_shapes(hint)
    }
    return beartype(function)


def _tells_of_shapes(hint: Any) -> bool:
    return any(
        isinstance(part, type) and issubclass(part, AbstractArray)
        for part in get_args(hint) or (hint,)
    )
