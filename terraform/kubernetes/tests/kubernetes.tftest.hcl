# `terraform test` with providers that only have the schemas: nothing is created, everything is planned.
mock_provider "helm" {
  override_during = plan
}
mock_provider "kubernetes" {
  override_during = plan
}

variables {
  image            = { repository = "registry.example.org/drover", tag = "0.1.0" }
  secrets          = { farm = "drover-secrets", database = "drover-database", bucket = "drover-bucket" }
  object_store_url = "s3://my-bucket/farm"
  public_url       = "https://farm.example.org"
  standby          = true
  monitoring       = true
  settings         = { cache = { retention_days = 90 } }
  workers = {
    x86 = { replicas = 4, maxReplicas = 20, tun = "smarter-devices/net_tun" }
    arm = { system = "aarch64-linux", replicas = 2, features = ["big-parallel"] }
  }
}

run "whole" {
  command = plan
  assert {
    condition     = kubernetes_namespace_v1.farm[0].metadata[0].labels["pod-security.kubernetes.io/enforce"] == "privileged"
    error_message = "the namespace lets workers make sandboxes"
  }
  assert {
    condition     = helm_release.farm.namespace == "builds" && helm_release.farm.name == "farm" && fileexists("${helm_release.farm.chart}/Chart.yaml")
    error_message = "the release is that of the chart, in the namespace"
  }
  assert {
    condition     = yamldecode(output.values[0]).coordinator.replicas == 2 && yamldecode(output.values[0]).workers.arm.system == "aarch64-linux"
    error_message = "the chart gets what the module got"
  }
  assert {
    condition     = output.cache_url == "https://farm.example.org/cache"
    error_message = "the cache's address is the public one"
  }
}

run "small" {
  command = plan
  variables {
    namespace        = { name = "farm", create = false }
    secrets          = { farm = "drover-secrets" }
    object_store_url = ""
    public_url       = ""
    standby          = false
    monitoring       = false
    settings         = {}
    workers          = { small = {} }
    wait             = true
  }
  assert {
    condition     = length(kubernetes_namespace_v1.farm) == 0 && helm_release.farm.namespace == "farm"
    error_message = "a namespace that is there is taken"
  }
  assert {
    condition     = output.cache_url == "http://farm-coordinator.farm.svc:7878/cache"
    error_message = "without a public address the cache is reached inside of the cluster"
  }
}

# Each of these variables is wrong in one way, and each says so.
run "wrong" {
  command = plan
  variables {
    name             = "a-farm-whose-name-is-too-long-for-pods"
    namespace        = { name = "kube-system" }
    image            = { repository = "registry.example.org/drover", tag = "latest" }
    secrets          = { farm = "" }
    object_store_url = "http://bucket"
    public_url       = "http://farm.example.org"
    workers          = { mac = { system = "aarch64-darwin" } }
  }
  expect_failures = [
    var.name, var.namespace, var.image, var.secrets, var.object_store_url, var.public_url, var.workers,
  ]
}

run "groups_beyond_their_bounds" {
  command = plan
  variables {
    workers = { a-group-whose-name-is-too-long = { replicas = 30 } }
  }
  expect_failures = [var.workers]
}

run "standby_without_a_database" {
  command = plan
  variables {
    secrets = { farm = "drover-secrets" }
  }
  expect_failures = [var.standby]
}

run "a_wait_that_never_ends" {
  command = plan
  variables {
    wait = true
  }
  expect_failures = [var.wait]
}
