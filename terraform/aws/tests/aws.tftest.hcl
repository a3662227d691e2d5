# `terraform test` with a provider that only has the schema: nothing is created, everything is planned.
mock_provider "aws" {
  mock_resource "aws_db_instance" {
    defaults = {
      address            = "db.example.org"
      master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:eu-central-1:1:secret:database" }]
    }
  }
  mock_resource "aws_s3_bucket" {
    defaults = { bucket = "drover-cache-1", arn = "arn:aws:s3:::drover-cache-1" }
  }
  mock_resource "aws_lb" {
    defaults = { arn = "arn:aws:elasticloadbalancing:eu-central-1:1:loadbalancer/app/front/1", dns_name = "front.example.org" }
  }
  mock_resource "aws_lb_target_group" {
    defaults = { arn = "arn:aws:elasticloadbalancing:eu-central-1:1:targetgroup/coordinator/1" }
  }
  mock_data "aws_availability_zones" {
    defaults = { names = ["eu-central-1a", "eu-central-1b", "eu-central-1c"] }
  }
}

variables {
  region        = "eu-central-1"
  source_url    = "https://example.org/drover.tar.gz"
  source_sha256 = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
  images        = { mac = "ami-0123" }
  workers = {
    x86   = { instance_types = ["c7i.2xlarge"], features = ["big-parallel"], slots = 4 }
    cheap = { instance_types = ["c7i.xlarge", "c6i.xlarge"], spot = true }
    arm   = { instance_types = ["c7g.2xlarge"], architecture = "arm64" }
  }
  macs = {
    mac1 = { instance_type = "mac2.metal", availability_zone = "eu-central-1c" }
  }
}

run "whole" {
  assert {
    condition     = output.cache_url == "http://10.77.0.10:7878/cache"
    error_message = "the cache's address is the coordinator's"
  }
  assert {
    condition     = strcontains(output.join, "--head 10.77.0.10:6379")
    error_message = "the command that joins names the head"
  }
  assert {
    condition     = aws_instance.mac["mac1"].host_id == aws_ec2_host.mac["mac1"].id && aws_instance.mac["mac1"].tenancy == "host"
    error_message = "a Mac runs on its dedicated host"
  }
  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.cache.block_public_acls,
      aws_s3_bucket_public_access_block.cache.block_public_policy,
      aws_s3_bucket_public_access_block.cache.ignore_public_acls,
      aws_s3_bucket_public_access_block.cache.restrict_public_buckets,
    ])
    error_message = "the bucket is closed to the public"
  }
  assert {
    condition     = alltrue([for rule in aws_security_group.farm.ingress : rule.self && length(coalesce(rule.cidr_blocks, [])) == 0])
    error_message = "machines are reached by each other only"
  }
  assert {
    condition     = !strcontains(aws_iam_role_policy.worker.policy, "s3:") && !strcontains(aws_iam_role_policy.worker.policy, "Put")
    error_message = "a worker reads one secret and nothing else"
  }
  assert {
    condition     = aws_autoscaling_group.worker["cheap"].mixed_instances_policy[0].instances_distribution[0].on_demand_percentage_above_base_capacity == 0
    error_message = "a group of spot machines has no other"
  }
  assert {
    condition     = alltrue([for template in aws_launch_template.worker : length(template.user_data) < 16384])
    error_message = "user data has at most 16 KiB"
  }
  assert {
    condition     = alltrue([for machine in concat(values(aws_instance.coordinator), values(aws_instance.mac)) : length(machine.user_data) < 16384])
    error_message = "user data has at most 16 KiB"
  }
  assert {
    condition     = keys(aws_instance.coordinator) == ["a"] && length(aws_instance.head) == 0 && output.front_address == null
    error_message = "a coordinator that stands by, and TLS, are there where they are asked for"
  }
}

run "standby_behind_tls" {
  variables {
    coordinator = { standby = true }
    front = {
      domain          = "farm.example.org"
      certificate_arn = "arn:aws:acm:eu-central-1:123456789012:certificate/1"
      zone_id         = "Z1"
    }
  }
  assert {
    condition     = keys(aws_instance.coordinator) == ["a", "b"] && aws_instance.coordinator["a"].private_ip == "10.77.0.10" && aws_instance.coordinator["b"].private_ip == "10.77.16.10"
    error_message = "two coordinators stand in two zones"
  }
  assert {
    condition     = output.cache_url == "https://farm.example.org/cache" && output.front_address == "front.example.org"
    error_message = "clients come by the domain"
  }
  assert {
    condition     = strcontains(output.join, "--head 10.77.0.12:6379") && aws_instance.head[0].private_ip == "10.77.0.12"
    error_message = "the head is a machine of its own"
  }
  assert {
    condition     = keys(aws_lb_target_group_attachment.coordinator) == ["a", "b"] && aws_lb_target_group.coordinator[0].health_check[0].path == "/healthz"
    error_message = "the front sends clients to the coordinator that works"
  }
  assert {
    condition     = aws_lb_listener.https[0].protocol == "HTTPS" && aws_lb_listener.http[0].default_action[0].type == "redirect"
    error_message = "the front speaks TLS and nothing else"
  }
  assert {
    condition     = strcontains(aws_instance.coordinator["b"].user_data, "export FIRST='no'") && strcontains(aws_instance.coordinator["a"].user_data, "export FIRST='yes'")
    error_message = "one coordinator makes the secrets"
  }
  assert {
    condition     = !strcontains(aws_iam_role_policy.worker.policy, aws_secretsmanager_secret.coordinators.arn)
    error_message = "workers and a head do not read what coordinators share"
  }
  assert {
    condition     = aws_security_group.clients.ingress != null && alltrue([for rule in aws_security_group.clients.ingress : tolist(rule.cidr_blocks) == tolist(["10.77.0.0/16"])])
    error_message = "coordinators are reached from the farm's network, where the front stands"
  }
}

run "standby_with_nothing_in_front" {
  command = plan
  variables {
    coordinator = { standby = true }
  }
  expect_failures = [var.coordinator]
}

run "front_without_a_name_and_with_a_certificate_of_another_region" {
  command = plan
  variables {
    clients = ["203.0.113.0/24"]
    front   = { domain = "farm", certificate_arn = "arn:aws:acm:us-east-1:123456789012:certificate/1" }
  }
  expect_failures = [var.front]
}

# Each of these variables is wrong in one way, and each says so.
run "wrong" {
  command = plan
  variables {
    region        = ""
    name          = "a-farm-with-a-very-long-name"
    clients       = ["0.0.0.0/0"]
    source_sha256 = ""
    source_url    = "http://example.org/drover.tar.gz"
    cidr          = "10.77.0.0/30"
    public_url    = "http://farm.example.org"
    cache         = { public = true }
    workers       = { mac = { instance_types = ["mac2.metal"] } }
    macs          = {}
  }
  expect_failures = [
    var.region, var.name, var.clients, var.source_sha256, var.source_url, var.cidr, var.public_url, var.cache,
    var.workers,
  ]
}

run "mac_in_another_region_and_a_group_beyond_its_bounds" {
  command = plan
  variables {
    macs    = { mac1 = { instance_type = "mac2.metal", availability_zone = "us-east-1a" } }
    workers = { x86 = { instance_types = ["c7i.large"], desired = 9 } }
  }
  expect_failures = [var.macs, var.workers]
}

run "mac_without_a_dedicated_host" {
  command = plan
  variables {
    macs = { mac1 = { instance_type = "mac2.metal", availability_zone = "eu-central-1a", dedicated_host = false } }
  }
  expect_failures = [var.macs]
}

run "mac_without_an_image" {
  command = plan
  variables { images = {} }
  expect_failures = [var.macs]
}
