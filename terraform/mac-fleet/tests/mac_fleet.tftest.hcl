# Everything is planned; how a Mac is joined over ssh is run by tests/deploy.
variables {
  head           = "10.0.0.5:6379"
  source_url     = "https://example.org/drover.tar.gz"
  source_sha256  = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  ray_token_file = "tests/files/ray-token"
  macs = {
    mini1 = { ssh_host = "10.0.0.21", host_key = "ssh-ed25519 AAAA", slots = 4 }
    mini2 = { ssh_host = "mini2.example.org", address = "10.0.0.22", host_key = "ssh-ed25519 BBBB", user = "builder" }
  }
}

run "whole" {
  command = plan
  assert {
    condition     = output.workers == tolist(["mini1", "mini2"])
    error_message = "each Mac is a worker"
  }
  assert {
    condition     = output.look["mini2"] == "ssh -p 22 builder@mini2.example.org tail -f /var/log/drover-worker.log"
    error_message = "a Mac is looked at by its own user"
  }
  assert {
    condition     = !strcontains(jsonencode([for mac in terraform_data.mac : mac.input]), "TESTTOKEN")
    error_message = "the token is not in the state"
  }
}

# Each of these variables is wrong in one way, and each says so.
run "wrong" {
  command = plan
  variables {
    head             = "coordinator:6379"
    source_url       = "http://example.org/drover.tar.gz"
    source_sha256    = ""
    ray_token_file   = "tests/files/nothing"
    private_key_file = "tests/files/nothing"
    grace_s          = 7200
    connect_within_s = 0
    macs             = { mini1 = { ssh_host = "10.0.0.21", host_key = "" } }
  }
  expect_failures = [
    var.head, var.source_url, var.source_sha256, var.ray_token_file, var.private_key_file, var.grace_s, var.connect_within_s, var.macs,
  ]
}

run "a_name_that_is_too_long_and_no_numeric_address" {
  command = plan
  variables {
    macs = {
      a-mac-whose-name-is-longer-than-that-of-any-worker-may-be-in-this-farm = {
        ssh_host = "mini.example.org", host_key = "ssh-ed25519 AAAA", slots = 0
      }
    }
  }
  expect_failures = [var.macs]
}

run "the_same_mac_twice" {
  command = plan
  variables {
    macs = {
      one = { ssh_host = "10.0.0.21", host_key = "ssh-ed25519 AAAA" }
      two = { ssh_host = "10.0.0.21", host_key = "ssh-ed25519 AAAA" }
    }
  }
  expect_failures = [var.macs]
}
