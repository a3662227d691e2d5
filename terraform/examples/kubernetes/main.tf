# The farm of examples/production.yaml on the cluster of the current context. Its Secrets are made first:
# terraform apply -target=module.farm.kubernetes_namespace_v1.farm, then kubectl create secret … (from_nothing.md).
variable "image" { type = object({ repository = string, tag = string }) }

provider "kubernetes" {
  config_path = "~/.kube/config"
}

provider "helm" {
  kubernetes = {
    config_path = "~/.kube/config"
  }
}

module "farm" {
  source           = "../../kubernetes"
  image            = var.image
  secrets          = { farm = "drover-secrets", database = "drover-database", bucket = "drover-bucket" }
  object_store_url = "s3://my-bucket/farm"
  public_url       = "https://farm.example.org"
  standby          = true
  settings         = { cache = { retention_days = 90 } }
  workers = {
    x86 = { replicas = 4, maxReplicas = 20, tun = "smarter-devices/net_tun" }
    arm = { system = "aarch64-linux", replicas = 2 }
  }
}

output "cache_url" { value = module.farm.cache_url }
output "show_public_key" { value = module.farm.show_public_key }
output "join" { value = module.farm.join }
