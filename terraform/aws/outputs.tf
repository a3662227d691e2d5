output "cache_url" {
  description = "Address of the cache, for `substituters`."
  value       = "${local.url}/cache"
}

output "show_public_key" {
  description = "Command that prints the cache's public key, which the coordinator makes on its first start."
  value       = "aws ssm start-session --region ${var.region} --target ${aws_instance.coordinator["a"].id} --document-name AWS-StartInteractiveCommand --parameters command='journalctl -u drover-coordinator | grep \"public key\"'"
}

output "show_api_token" {
  description = "Command that prints the API token, which clients send."
  value       = "aws secretsmanager get-secret-value --region ${var.region} --secret-id ${aws_secretsmanager_secret.coordinators.name} --query SecretString --output text | python3 -c 'import json, sys; print(json.load(sys.stdin)[\"api-token\"].strip())'"
}

output "join" {
  description = "Command that joins a further machine in the farm's network; the token is in the secret."
  value       = "aws secretsmanager get-secret-value --region ${var.region} --secret-id ${aws_secretsmanager_secret.ray_token.name} --query SecretString --output text > ray-token && chmod 400 ray-token && drover worker --head ${local.head} --host ADDRESS --ray-token ray-token --name NAME --state-dir /var/lib/drover-worker"
}

output "bucket" {
  description = "Bucket with the cache's objects."
  value       = aws_s3_bucket.cache.bucket
}

output "front_address" {
  description = "What the record of front's domain names, where there is a front."
  value       = one(aws_lb.front[*].dns_name)
}
