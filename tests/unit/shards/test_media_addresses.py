from __future__ import annotations

import pytest

from airflow_vlm_provider.shards.addresses import address_refusal, parse_address

PUBLIC = [
    "8.8.8.8",
    "93.184.216.34",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]
PRIVATE = [
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "fd12:3456::1",
    "fec0::1",
    "::ffff:10.0.0.1",
    "64:ff9b::a00:1",
    "2002:a00:1::1",
]
LOOPBACK = ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::"]
NEVER = [
    "169.254.169.254",
    "169.254.0.1",
    "fe80::1",
    "fe80::1%eth0",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::",
    "0.0.0.0",
    "0.1.2.3",
    "::",
    "::127.0.0.1",
    "224.0.0.1",
    "239.1.2.3",
    "ff02::1",
    "240.0.0.1",
    "255.255.255.255",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
    "fd00:ec2::254",
    "fd00:ec2::254%eth0",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_always_within_reach(address: str) -> None:
    assert address_refusal(address, "public") is None
    assert address_refusal(address, "private") is None
    assert address_refusal(address, "loopback") is None


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_need_a_root_that_names_the_host(address: str) -> None:
    assert address_refusal(address, "public") == "private"
    assert address_refusal(address, "private") is None


@pytest.mark.parametrize("address", LOOPBACK)
def test_loopback_needs_a_root_that_spells_it(address: str) -> None:
    assert address_refusal(address, "public") == "loopback"
    assert address_refusal(address, "private") == "loopback"
    assert address_refusal(address, "loopback") is None


@pytest.mark.parametrize("address", NEVER)
def test_some_addresses_are_never_within_reach(address: str) -> None:
    assert address_refusal(address, "public")
    assert address_refusal(address, "private")
    assert address_refusal(address, "loopback")


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1", "127.0.0.1", "::ffff:7f00:1"]
)
def test_all_spellings_of_an_address_are_read(host: str) -> None:
    assert str(parse_address(host)) == "127.0.0.1"


@pytest.mark.parametrize("host", ["localhost", "example.com", "1.2.3.4.5", "", "caf\u00e9"])
def test_a_name_is_no_address(host: str) -> None:
    assert parse_address(host) is None
