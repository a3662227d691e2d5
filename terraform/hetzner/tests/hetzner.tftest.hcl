# `terraform test` with a provider that only has the schema: nothing is created, everything is planned.
mock_provider "hcloud" {
  override_during = plan
  mock_resource "hcloud_server" {
    defaults = { id = "4711", ipv4_address = "203.0.113.10" }
  }
  mock_resource "hcloud_volume" {
    defaults = { id = "77", linux_device = "/dev/disk/by-id/scsi-0HC_Volume_77" }
  }
  mock_resource "hcloud_volume_attachment" {
    defaults = { id = "77" }
  }
  mock_resource "hcloud_firewall" {
    defaults = { id = "88" }
  }
  mock_resource "hcloud_network" {
    defaults = { id = "99" }
  }
  mock_resource "hcloud_network_subnet" {
    defaults = { id = "99-10.78.0.0/24" }
  }
  mock_resource "hcloud_load_balancer" {
    defaults = { id = "55", ipv4 = "203.0.113.20" }
  }
  mock_resource "hcloud_managed_certificate" {
    defaults = { id = "66" }
  }
}

variables {
  location      = "fsn1"
  source_url    = "https://example.org/drover.tar.gz"
  source_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  ssh           = { public_key = "ssh-ed25519 AAAA", from = ["203.0.113.7/32"] }
  secrets       = { ray_token_file = "tests/files/ray-token", bucket_file = "tests/files/bucket" }
  object_store  = { url = "s3://bucket/farm", endpoint = "https://fsn1.your-objectstorage.com" }
  domain        = "farm.example.org"
  workers = {
    x86 = { server_type = "cx53", count = 2, features = ["big-parallel"], slots = 4 }
    arm = { server_type = "cax41" }
  }
}

run "whole" {
  command = plan
  assert {
    condition     = output.cache_url == "https://farm.example.org/cache" && output.front_address == "203.0.113.20"
    error_message = "the cache's address is that of the domain"
  }
  assert {
    condition     = strcontains(output.join, "--head 10.78.0.10:6379")
    error_message = "the command that joins names the head"
  }
  assert {
    condition     = toset(keys(hcloud_server.worker)) == toset(["drover-x86-1", "drover-x86-2", "drover-arm-1"])
    error_message = "each group has its servers"
  }
  assert {
    condition     = alltrue([for rule in hcloud_firewall.farm.rule : rule.port == "22" && tolist(rule.source_ips) == tolist(["203.0.113.7/32"])])
    error_message = "from the internet servers are reached by ssh of the operator only"
  }
  assert {
    condition     = length(hcloud_firewall.clients) == 0 && length(hcloud_load_balancer_service.front) == 1
    error_message = "with a domain clients come through TLS only"
  }
  # The token and the credentials of tests/files.
  assert {
    condition     = alltrue([for server in concat([hcloud_server.coordinator], values(hcloud_server.worker)) : !strcontains(server.user_data, "TESTTOKEN") && !strcontains(server.user_data, "TESTKEY")])
    error_message = "no secret is in user data"
  }
  assert {
    condition     = alltrue([for server in concat([hcloud_server.coordinator], values(hcloud_server.worker)) : length(server.user_data) < 32768])
    error_message = "user data has at most 32 KiB"
  }
  assert {
    condition     = strcontains(hcloud_server.coordinator.user_data, "DISK='/dev/disk/by-id/scsi-0HC_Volume_77'") && hcloud_volume.state.delete_protection
    error_message = "the coordinator's state lies on a volume that is protected"
  }
}

run "without_bucket_and_domain" {
  command = plan
  variables {
    domain       = ""
    clients      = ["203.0.113.0/24"]
    object_store = {}
    secrets      = { ray_token_file = "tests/files/ray-token" }
  }
  assert {
    condition     = output.cache_url == "http://10.78.0.10:7878/cache" && length(hcloud_firewall.clients) == 1
    error_message = "without a domain named clients come without TLS"
  }
  assert {
    condition     = !strcontains(hcloud_server.coordinator.user_data, "object_store_url") && !strcontains(hcloud_server.coordinator.user_data, "export GIVEN_ENV")
    error_message = "without a bucket objects lie on the volume"
  }
}

# Each of these variables is wrong in one way, and each says so.
run "wrong" {
  command = plan
  variables {
    name          = "a-farm-with-a-very-long-name"
    location      = ""
    source_url    = "http://example.org/drover.tar.gz"
    source_sha256 = ""
    cidr          = "8.8.8.0/24"
    domain        = "farm"
    coordinator   = { volume_gb = 1 }
    ssh           = { public_key = "AAAA", from = ["203.0.113.7/32"] }
    secrets       = { ray_token_file = "tests/files/nothing" }
  }
  expect_failures = [
    var.name, var.location, var.source_url, var.source_sha256, var.cidr, var.domain, var.coordinator, var.ssh, var.secrets,
  ]
}

run "bucket_without_credentials_and_ssh_for_everybody" {
  command = plan
  variables {
    ssh     = { public_key = "ssh-ed25519 AAAA", from = ["0.0.0.0/0"] }
    secrets = { ray_token_file = "tests/files/ray-token" }
  }
  expect_failures = [var.ssh, var.object_store]
}

run "clients_in_the_clear" {
  command = plan
  variables {
    domain  = ""
    clients = ["0.0.0.0/0"]
  }
  expect_failures = [var.clients]
}

run "arm64_where_there_is_none" {
  command = plan
  variables {
    location = "ash"
  }
  expect_failures = [var.workers]
}

run "a_key_that_is_no_file_and_credentials_that_lack_one" {
  command = plan
  variables {
    ssh     = { public_key = "ssh-ed25519 AAAA", private_key_file = "tests/files/nothing", from = ["203.0.113.7/32"] }
    secrets = { ray_token_file = "tests/files/ray-token", bucket_file = "tests/files/ray-token" }
  }
  expect_failures = [var.ssh, var.secrets]
}

run "a_mac_and_an_object_store_of_another_kind" {
  command = plan
  variables {
    object_store = { url = "http://bucket", endpoint = "https://fsn1.your-objectstorage.com" }
    workers      = { mac = { server_type = "mac2.metal" } }
  }
  expect_failures = [var.object_store, var.workers]
}
