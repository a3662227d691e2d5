locals {
  namespace = var.namespace.create ? kubernetes_namespace_v1.farm[0].metadata[0].name : var.namespace.name
  url       = var.public_url == "" ? "http://${var.name}-coordinator.${var.namespace.name}.svc:7878" : var.public_url
  values = {
    image       = var.image
    secretName  = var.secrets.farm
    publicUrl   = var.public_url
    database    = { secretName = var.secrets.database }
    objectStore = { url = var.object_store_url, secretName = var.secrets.bucket }
    coordinator = { replicas = var.standby ? 2 : 1 }
    settings    = var.settings
    workers     = var.workers
    monitoring  = { enabled = var.monitoring }
  }
}

# Workers make sandboxes, for which no standard of Pod Security but the widest leaves room; what they have stands in the chart.
resource "kubernetes_namespace_v1" "farm" {
  count = var.namespace.create ? 1 : 0
  metadata {
    name   = var.namespace.name
    labels = { "pod-security.kubernetes.io/enforce" = "privileged" }
  }
}

resource "helm_release" "farm" {
  name            = var.name
  namespace       = local.namespace
  chart           = "${path.module}/../../infra/deploy/kubernetes/drover"
  values          = concat([yamlencode(local.values)], var.values)
  wait            = var.wait
  atomic          = var.wait
  cleanup_on_fail = true
  max_history     = 5
  # Workers end their builds when a version replaces them.
  timeout = 4000
}
