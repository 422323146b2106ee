import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { t, type Test } from 'tap'
import ts from 'typescript'
import { parse, parseAllDocuments } from 'yaml'
import { readConfig, SECRETS } from '#src/config.js'
import { Environment } from '#src/environment.js'

interface Container {
  name: string
  image: string
  ports?: { name: string, containerPort: number }[]
  env?: { name: string, value?: string }[]
  volumeMounts?: { name: string, mountPath: string }[]
  securityContext?: object
  startupProbe: Probe
  livenessProbe: Probe
  readinessProbe?: Probe
}
interface Probe { httpGet?: { path: string, port: string } }
interface PodSpec {
  containers: Container[]
  initContainers?: Container[]
  volumes: { name: string }[]
  enableServiceLinks?: boolean
  topologySpreadConstraints?: { labelSelector: { matchLabels: Labels } }[]
}
type Labels = Record<string, string>
interface Manifest {
  apiVersion: string
  kind: string
  metadata: { name: string, labels?: Labels }
  spec: PodSpec & {
    selector: Labels & { matchLabels: Labels }
    podSelector: { matchLabels: Labels }
    template: { metadata: { labels: Labels }, spec: PodSpec }
    scaleTargetRef: { kind: string, name: string }
    ports: { port: number, targetPort: string }[]
    ingress: { ports: { port: string | number }[] }[]
    serviceName?: string
    volumeClaimTemplates?: { metadata: { name: string } }[]
  }
}

const read = (path: string) => parseAllDocuments(readFileSync(path, 'utf8')).map(document => {
  if (document.errors.length > 0) throw document.errors[0]
  return document.toJS() as Manifest
})
const files = ['kubernetes', 'sidecar'].flatMap(folder => readdirSync(`examples/${folder}`).filter(name => name.endsWith('.yaml')).map(name => `examples/${folder}/${name}`))
const manifests = new Map(files.map(path => [path, read(path)]))

/**
 * Returns the errors of objects by the schemas of Kubernetes, which kubernetes-models has as types: unknown fields, missing
 * ones and wrong types. The compiler finds all three in a literal.
 */
function schemaErrors (t: Test, objects: object[]): string[] {
  const source = objects.map((object, index) => {
    const { apiVersion, kind } = object as Manifest
    return `import { I${kind} as Type${index} } from 'kubernetes-models/${apiVersion}/${kind}'\nexport const object${index}: Type${index} = ${JSON.stringify(object)}`
  }).join('\n')
  const path = join(t.testdir({}), 'manifests.ts')
  writeFileSync(path, source)
  const program = ts.createProgram([path], {
    strict: true, noEmit: true, skipLibCheck: true, types: [], module: ts.ModuleKind.ESNext, moduleResolution: ts.ModuleResolutionKind.Bundler
  })
  return ts.getPreEmitDiagnostics(program).map(({ messageText }) => ts.flattenDiagnosticMessageText(messageText, '\n'))
}

t.test('each manifest is valid by the schemas of Kubernetes, and broken ones are not', async t => {
  const all = [...manifests.values()].flat()
  t.ok(all.length > 5, 'there are manifests')
  for (const { apiVersion, kind } of all) t.match(apiVersion, /^(?:[a-z.0-9]+\/)?v\d$/, `${kind} has a stable version`)
  t.same(schemaErrors(t, all), [])
  // The check can fail.
  const deployment = all.find(({ kind }) => kind === 'Deployment') as Manifest
  const broken = (change: (copy: any) => void) => {
    const copy = structuredClone(deployment)
    change(copy)
    return copy
  }
  const errors = schemaErrors(t, [
    broken(({ spec }) => { spec.replicaz = 3 }),
    broken(({ spec }) => { delete spec.selector }),
    broken(({ spec }) => { spec.template.spec.containers[0].ports[0].containerPort = 'http' }),
    broken(({ spec }) => { spec.template.spec.containers[0].env[0].value = 8080 }),
    broken(({ spec }) => { delete spec.template.spec.containers[0].name }),
    broken(copy => { copy.apiVersion = 'apps/v9' })
  ])
  t.equal(errors.length, 6, errors.join('\n'))
})

const podOf = ({ kind, spec }: Manifest) => kind === 'Pod' ? spec : spec.template?.spec
const relayOf = (pod: PodSpec) => [...pod.initContainers ?? [], ...pod.containers].find(({ name }) => name === 'identify-relay') as Container

t.test('the names in each manifest lead to something', async t => {
  for (const [path, objects] of manifests) {
    const workload = objects.find(object => podOf(object) !== undefined) as Manifest
    const pod = podOf(workload)
    const relay = relayOf(pod)
    const volumes = [...pod.volumes, ...(workload.spec.volumeClaimTemplates ?? []).map(({ metadata }) => metadata)].map(({ name }) => name)
    t.same(relay.volumeMounts?.map(({ name }) => name).sort(), volumes.sort(), `${path}: each volume is mounted`)
    const ports = relay.ports?.map(({ name }) => name) ?? []
    for (const { httpGet } of [relay.startupProbe, relay.livenessProbe, relay.readinessProbe ?? {}]) {
      if (httpGet !== undefined) t.ok(ports.includes(httpGet.port), `${path}: the probe of ${httpGet.path} asks a port: ${httpGet.port}`)
    }
    for (const { labelSelector } of pod.topologySpreadConstraints ?? []) {
      t.match(workload.spec.template.metadata.labels, labelSelector.matchLabels, `${path}: the pods that are spread are these`)
    }
    for (const { kind, spec, metadata } of objects) {
      const name = `${path}: ${kind} ${metadata.name}`
      const selector = { Service: spec.selector, NetworkPolicy: spec.podSelector?.matchLabels }[kind] ?? spec.selector?.matchLabels
      if (selector !== undefined) t.match(workload.spec.template.metadata.labels, selector, `${name} selects the pods`)
      if (kind === 'Service') for (const { targetPort } of spec.ports) t.ok(ports.includes(targetPort), `${name} leads to a port: ${targetPort}`)
      if (kind === 'NetworkPolicy') for (const { port } of spec.ingress.flatMap(rule => rule.ports)) t.ok(ports.includes(String(port)), `${name} admits to a port: ${port}`)
      if (kind === 'HorizontalPodAutoscaler') t.match(workload, { kind: spec.scaleTargetRef.kind, metadata: { name: spec.scaleTargetRef.name } }, `${name} scales the workload`)
      if (spec.serviceName !== undefined) t.ok(objects.some(object => object.kind === 'Service' && object.metadata.name === spec.serviceName), `${name} has its Service`)
    }
  }
})

t.test('npm start, the image and the unit for systemd give Node the same options, and this Node knows them', async t => {
  const { scripts: { start } } = JSON.parse(readFileSync('package.json', 'utf8')) as { scripts: { start: string } }
  const [node, ...args] = start.split(' ')
  t.match(args, ['--max-semi-space-size=16', 'dist/server.js'])
  t.ok(readFileSync('Dockerfile', 'utf8').includes(`\nCMD ${JSON.stringify([node, ...args]).replaceAll(',', ', ')}\n`))
  t.ok(readFileSync('docs/deployment.md', 'utf8').includes(`\nExecStart=/usr/bin/${start}\n`))
  t.equal(spawnSync(process.execPath, [...args, '--version']).status, 0)
})

t.test('the relay of each manifest has variables and a version that it starts with, and no privileges', async t => {
  const known = new Set([...Object.keys(Environment.properties), ...SECRETS.map(name => `${name}_FILE`)])
  const { version } = JSON.parse(readFileSync('package.json', 'utf8'))
  t.ok(readFileSync('Dockerfile', 'utf8').includes(`ARG VERSION=${version}\n`), 'the Dockerfile has the version')
  const secrets: Record<string, string> = { token: 'token', 'api-keys': 'backend:a-key-of-at-least-16', 'redis-url': 'redis://redis:6379' }
  for (const [path, objects] of manifests) {
    const pod = podOf(objects.find(object => podOf(object) !== undefined) as Manifest)
    const relay = relayOf(pod)
    t.equal(relay.image, `identify-relay:${version}`, `${path}: the version of the image`)
    t.equal(pod.enableServiceLinks, false, `${path}: Kubernetes sets no variable for a Service`)
    t.match(relay.securityContext, {
      runAsNonRoot: true, runAsUser: 1000, allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: { drop: ['ALL'] }
    }, `${path}: the container has no privileges`)
    const env = Object.fromEntries((relay.env ?? []).map(({ name, value }) => [name, value]))
    for (const name of Object.keys(env)) t.ok(known.has(name), `${path}: ${name} is a variable of the relay`)
    const config = readConfig(env, file => {
      const mount = relay.volumeMounts?.find(({ mountPath }) => file.startsWith(`${mountPath}/`))
      return mount === undefined ? '' : secrets[file.slice(mount.mountPath.length + 1)] ?? ''
    })
    t.equal(config.MIXPANEL_TOKEN, 'token')
    if (config.OUTBOX.startsWith('file:')) t.ok(relay.volumeMounts?.some(({ mountPath }) => mountPath === config.OUTBOX.slice(5)), `${path}: the outbox is on a volume`)
  }
})

interface Workflow {
  permissions: Labels
  jobs: Record<string, { 'runs-on': string, 'timeout-minutes': number, steps: { uses?: string, run?: string }[] }>
}

t.test('the workflows pin their actions, read only, and run commands that exist', async t => {
  const { scripts } = JSON.parse(readFileSync('package.json', 'utf8'))
  for (const name of readdirSync('.github/workflows')) {
    const { permissions, jobs } = parse(readFileSync(`.github/workflows/${name}`, 'utf8')) as Workflow
    t.same(permissions, { contents: 'read' }, `${name}: what a job may do is named in the job`)
    for (const [job, { 'runs-on': machine, 'timeout-minutes': minutes, steps }] of Object.entries(jobs)) {
      t.match({ machine, minutes }, { machine: /^ubuntu-\d/, minutes: Number }, `${name}: ${job} has a machine and a bound`)
      for (const { uses, run = '' } of steps) {
        if (uses !== undefined) t.match(uses, /^[\w-]+\/[\w-]+@(?:v\d+|[0-9a-f]{40})$/, `${name}: ${uses} has a version`)
        for (const [, script = ''] of run.matchAll(/npm (?:run (?=[\w:])|(?=test))([\w:]+)/g)) t.ok(script in scripts, `${name}: npm run ${script} exists`)
        for (const [, path = ''] of run.matchAll(/node ([\w/]+\.js)/g)) t.ok(existsSync(path), `${name}: ${path} exists`)
      }
    }
  }
})
