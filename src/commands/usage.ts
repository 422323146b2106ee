export const USAGE = `node dist/server.js [command]

  serve                     serve identities; the default
  healthcheck               exit 0 if the relay on HOST and PORT is alive
  check-config              check and print the configuration, without secrets
  doctor [--id-merge]       check the way to Mixpanel, the token, Redis and the disk of the outbox; with --id-merge
                            also the mode of the project
  verify --from DAY --to DAY [--sent FILE] [--all]
                            compare what was sent with what Mixpanel has merged
  outbox list               print the queued identities
  outbox dead               print the dead letters
  outbox replay ID...|all   queue dead letters again
  outbox drop ID...|all     delete dead letters
  outbox drop --user ID     delete all that is stored of a user
  outbox pause|resume       stop or go on with the delivery of queued identities
  openapi                   print openapi.yaml
  --help, --version

docs/configuration.md describes the environment.`
