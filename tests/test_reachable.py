"""An address where nobody listens is known at once."""

import socket

import pytest

from bixse.reachable import refuse_unreachable


def test_where_nobody_listens_it_is_said_with_the_reason() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        # Bound, and not listening: no other process can take the port meanwhile.
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            with pytest.raises(ConnectionError, match=f"no Ray at {address}: Connection refused"):
                refuse_unreachable(address)
        taken.listen()
        refuse_unreachable(f"127.0.0.1:{port}")
        refuse_unreachable(f"ray://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["auto", "local", "", "127.0.0.1", "http://127.0.0.1:1", "a:b"])
def test_what_names_no_port_is_left_to_ray(address: str) -> None:
    """It would raise: at none of these does anybody listen."""
    refuse_unreachable(address)


def test_a_host_that_is_none_is_said() -> None:
    with pytest.raises(ConnectionError, match=r"no Ray at no\.such\.host\.invalid:6379: "):
        refuse_unreachable("no.such.host.invalid:6379")
    with pytest.raises(
        ConnectionError, match=r"no Ray at a\.\.b:6379: a\.\.b is no name of a host"
    ):
        refuse_unreachable("a..b:6379")
